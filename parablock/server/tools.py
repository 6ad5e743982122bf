"""The tools of a request: what it may say about them, and what that means for its answers."""

import contextlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from parablock.server.strict import Json, Strict, Text, plain_json
from parablock.server.tool_formats import Format
from parablock.server.tool_reader import Reader

NAME = r"^[a-zA-Z0-9_-]{1,64}$"
MOST = 128  # tools


class Function(Strict):
    """What a model may call. `strict`: arguments always fit `parameters`, a JSON schema."""

    name: str = Field(pattern=NAME)
    description: Text | None = None
    parameters: Json | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> "Function":
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise ValueError(f"parameters describe {str(kind)[:40]!r}, and arguments are an object; use type 'object'")
        return self

    def shown(self) -> dict[str, Any]:
        """As chat templates take it."""
        described = {"description": self.description} if self.description else {}
        shown = {"name": self.name, **described, "parameters": self.schema_of_arguments()}
        return {"type": "function", "function": shown}

    def schema_of_arguments(self) -> dict[str, Any]:
        """Without parameters there are none to give."""
        return self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(Strict):
    """A function as chats name it."""

    type: Literal["function"]
    function: Function


class Named(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """This function shall be called."""

    type: Literal["function"]
    function: Named


class Called(Strict):
    """A function with the arguments of a call, as JSON."""

    name: Text
    arguments: Text


class ToolCall(Strict):
    """A call of an earlier answer."""

    id: Text
    type: Literal["function"] = "function"
    function: Called

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: the arguments as an object, if they are one."""
        arguments: Any = self.function.arguments
        with contextlib.suppress(ValueError, RecursionError):  # a model wrote them, and may see what it wrote
            arguments = plain_json(json.loads(arguments or "{}"))
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class ToolFields(Strict):
    """The fields of a chat that belong to tools."""

    tools: list[Tool] | None = Field(None, max_length=MOST)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _known_tools(self) -> "ToolFields":
        names = [tool.function.name for tool in self.tools or []]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"tools: {min(twice)!r} is there twice; give every function a name of its own")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice: {self.tool_choice.function.name[:64]!r} is none of the tools; name one of them"
            )
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice='required' needs tools; pass some")
        return self

    def tool_use(self) -> "ToolUse | None":
        """What the answers may call; None: nothing."""
        functions = [tool.function for tool in self.tools or []]
        if not functions or self.tool_choice == "none":
            return None
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return ToolUse(
            shown=tuple(functions),
            callable=tuple(f for f in functions if named in (None, f.name)),
            forced=named is not None or self.tool_choice == "required",
            one=named is not None or self.parallel_tool_calls is False,
        )


@dataclass(frozen=True)
class ToolUse:
    """How the answers to one request use its tools."""

    shown: tuple[Function, ...]  # to the model
    callable: tuple[Function, ...]
    forced: bool  # an answer is a call
    one: bool  # at most

    def reader(self, format: Format) -> Reader:
        """Reads one answer."""
        return Reader(format, {function.name for function in self.callable}, one=self.one)
