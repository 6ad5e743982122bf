"""What a request may say, and the settings it stands for. Anything else is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from parablock.decoding.config import DecodeConfig, Drafter, Mode, Strategy
from parablock.server.strict import NoMedia, Strict, Text
from parablock.server.structured import Structured
from parablock.server.tools import ToolCall, ToolFields, ToolUse
from parablock.settings import help_of

LARGEST = 2**31 - 1
# of OpenAI's interface: accepted only with the value that changes nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "store": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "background": (False,),
    "truncation": ("disabled",),
    "include": ([],),
    "reasoning": (),
    "conversation": (),
    "max_tool_calls": (),
}
DECODING = (
    "mode", "temperature", "top_p", "top_k", "seed", "threshold", "sub_block_size", "strategy", "factor",
    "tokens_per_step", "sub_block_cache", "drafter", "draft_tokens", "draft_threshold",
)  # fmt: skip


def _setting(name: str, **limits: Any) -> Any:
    """An optional field that is one of `DecodeConfig`'s, in its words."""
    return Field(None, description=help_of(DecodeConfig, name), **limits)


class TextPart(Strict):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a chat. The fields of OpenAI's answers that hold nothing here may come back as null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | list[TextPart] | None, NoMedia] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    name: Text | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _of_its_role(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to messages of the assistant, not to one of role {self.role!r}")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; only an assistant's message with tool_calls needs none")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError(
                "tool_call_id names the call that a message of role 'tool' answers, and belongs there alone"
            )
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        parts = [] if self.content is None else self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class StreamOptions(Strict):
    """`include_usage`: one more chunk at the end, with the usage."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Body(Structured):
    """What chats and completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | list[Text] | None = None
    max_tokens: int | None = _setting("max_new_tokens", ge=1, le=LARGEST)
    n: int | None = Field(None, ge=1, le=128)
    temperature: float | None = _setting("temperature", ge=0, le=100)
    top_p: float | None = _setting("top_p", gt=0, le=1)
    seed: int | None = _setting("seed", ge=-(2**63), le=2**63 - 1)
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    mode: Mode | None = _setting("mode")
    threshold: float | None = _setting("threshold", ge=0, le=1)
    sub_block_size: int | None = _setting("sub_block_size", ge=1, le=LARGEST)
    strategy: Strategy | None = _setting("strategy")
    factor: float | None = _setting("factor", gt=0)
    tokens_per_step: int | None = _setting("tokens_per_step", ge=1, le=LARGEST)
    sub_block_cache: bool | None = _setting("sub_block_cache")
    drafter: Drafter | None = _setting("drafter")
    draft_tokens: int | None = _setting("draft_tokens", ge=1, le=LARGEST)
    draft_threshold: float | None = _setting("draft_threshold", ge=0, lt=1)
    top_k: int | None = _setting("top_k", ge=1, le=LARGEST)
    denoising: bool | None = Field(None, description="When streaming: every step's provisional tokens as well.")

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: Any) -> Any:
        """OpenAI's fields that change nothing are left out; with another value they stay, and are refused."""
        if not isinstance(body, dict):
            return body
        return {
            name: value
            for name, value in body.items()
            if name in cls.model_fields
            or name not in NEUTRAL
            or not (value is None or any(type(value) is type(v) and value == v for v in NEUTRAL[name]))
        }

    @model_validator(mode="after")
    def _check_together(self) -> "Body":
        stops = self.stops()
        if len(stops) > 4 or "" in stops:
            raise ValueError("stop takes up to 4 strings, none of them empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to stream=true; leave it out")
        if self.denoising and (not self.stream or self.choices() != 1):
            raise ValueError("denoising=true needs stream=true and a single choice")
        return self

    def choices(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    def stops(self) -> list[str]:
        """The strings before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def longest(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_tokens

    def tool_use(self) -> ToolUse | None:
        """What the answers may call."""
        return None

    def is_held(self) -> bool:
        """Whether something may hold the answers to a grammar."""
        return self.grammar() is not None or self.tool_use() is not None

    def decode_config(self) -> DecodeConfig:
        """The settings; what is left out has `DecodeConfig`'s default, so without a temperature decoding is greedy."""
        given = {name: getattr(self, name) for name in DECODING if getattr(self, name) is not None}
        return DecodeConfig(**given, max_new_tokens=self.longest())


class ChatBody(ToolFields, Body):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = _setting("max_new_tokens", ge=1, le=LARGEST)

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatBody":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; pass one of them")
        return self

    def longest(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(Body):
    """`POST /v1/completions`: a text, token ids, or a list of either."""

    prompt: Text | list[Text] | list[int] | list[list[int]]

    @model_validator(mode="after")
    def _some_prompt(self) -> "CompletionBody":
        if not self.prompts():
            raise ValueError("prompt is an empty list; pass a text, token ids, or several of either")
        return self

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return [*self.prompt]

    def choices(self) -> int:
        """How many answers are asked for, over all prompts."""
        return (self.n or 1) * len(self.prompts())
