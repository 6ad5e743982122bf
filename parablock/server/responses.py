"""What a request to `/v1/responses` may say. It stands for a chat, and is answered as one."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from parablock.decoding.config import DecodeConfig
from parablock.server.errors import ApiError, from_validation
from parablock.server.protocol import LARGEST, Body, ChatBody
from parablock.server.strict import Json, NoMedia, Strict, Text
from parablock.server.tools import MOST, Function
from parablock.settings import help_of

ELSEWHERE = {  # a chat's fields
    "max_tokens": "use max_output_tokens",
    "response_format": "use text.format",
    "n": "a response has one answer; leave it out",
    "denoising": "use /v1/chat/completions",
}


class InputText(Strict):
    """A piece of a message; only text is understood."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Content = Annotated[Text | list[InputText], NoMedia]


class Item(Strict):
    """What all items have; both are of the server that made them."""

    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class CallItem(Item):
    """A call of a function."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class ResultItem(Item):
    """What it returned."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Content


def _kind(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="an item is a message, a function_call or a function_call_output; leave out others",
    ),
]
ITEMS: TypeAdapter[list[MessageItem | CallItem | ResultItem]] = TypeAdapter(list[AnyItem])


def _as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class OfType(Strict):
    """The one type of tools; told before what else is wrong."""

    type: Literal["function"]


class FlatTool(Function, OfType):
    """A function as responses name it."""


class FlatNamedTool(OfType):
    """This function shall be called."""

    name: str


class PlainFormat(Strict):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    """JSON of this schema."""

    type: Literal["json_schema"]
    name: str
    schema_: Json = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class TextSettings(Strict):
    """What the answer's text is."""

    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class ResponseBody(Body):
    """`POST /v1/responses`."""

    input: Annotated[list[AnyItem], BeforeValidator(_as_items, json_schema_input_type=Text | list[AnyItem])] = Field(
        min_length=1
    )
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=LARGEST, description=help_of(DecodeConfig, "max_new_tokens"))
    tools: list[FlatTool] | None = Field(None, max_length=MOST)
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    store: bool | None = None
    previous_response_id: str | None = None

    @model_validator(mode="after")
    def _of_responses(self) -> "ResponseBody":
        for name, remedy in ELSEWHERE.items():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not supported here; {remedy}")
        return self

    def chat(self) -> ChatBody:
        """The same as a chat.

        Raises:
            ApiError: what a chat refuses.
        """
        fields = {name: getattr(self, name) for name in Body.model_fields if getattr(self, name) is not None}
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        given: dict[str, Any] = {**fields, "messages": [*messages, *messages_of(self.input)]}
        if self.max_output_tokens is not None:
            given["max_completion_tokens"] = self.max_output_tokens
        if self.tools is not None:
            functions = [tool.model_dump(exclude={"type"}) for tool in self.tools]
            given["tools"] = [{"type": "function", "function": function} for function in functions]
        if isinstance(self.tool_choice, FlatNamedTool):
            given["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        elif self.tool_choice is not None:
            given["tool_choice"] = self.tool_choice
        if self.parallel_tool_calls is not None:
            given["parallel_tool_calls"] = self.parallel_tool_calls
        if self.text and self.text.format:
            given["response_format"] = _response_format(self.text.format)
        try:
            return ChatBody.model_validate(given)
        except ValidationError as error:
            raise from_validation(error.errors()) from None


def _response_format(format: PlainFormat | SchemaFormat) -> dict[str, Any]:
    if isinstance(format, PlainFormat):
        return {"type": format.type}
    told = format.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return {"type": "json_schema", "json_schema": told}


def messages_of(items: list[Any]) -> list[dict[str, Any]]:
    """A chat's messages. Calls belong to the assistant's message before them."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case MessageItem():
                messages.append({"role": item.role, "content": _text(item.content)})
            case CallItem():
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                function = {"name": item.name, "arguments": item.arguments}
                messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
            case ResultItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    return messages


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def kept_items(stored: list[dict[str, Any]]) -> list[MessageItem | CallItem | ResultItem]:
    """The items of an earlier response, as they were kept."""
    return ITEMS.validate_python(stored)


def no_store(param: str) -> ApiError:
    """Nothing is kept here."""
    message = f"{param}: this server keeps no responses; send the whole conversation as input, or start it with "
    return ApiError(400, f"{message}--keep-responses", param, "responses_not_kept")
