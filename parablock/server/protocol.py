"""What a request may say, and the settings it stands for. Anything else is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from parablock.decoding.config import MOST_BIASED, DecodeConfig, Drafter, Mode, Strategy
from parablock.decoding.logprobs import MOST_TOP
from parablock.server.logprobs import Told
from parablock.server.strict import NoMedia, Strict, Text
from parablock.server.structured import Structured
from parablock.server.tools import ToolCall, ToolFields, ToolUse
from parablock.settings import help_of

LARGEST = 2**31 - 1
MOST_STOPS = 1024
# of OpenAI's interface: accepted only with the value that changes nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
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
    "tokens_per_step", "sub_block_cache", "drafter", "draft_tokens", "draft_threshold", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "ignore_eos", "min_tokens",
)  # fmt: skip


def _setting(name: str, **limits: Any) -> Any:
    """An optional field that is one of `DecodeConfig`'s, in its words."""
    return Field(None, description=help_of(DecodeConfig, name), **limits)


def _token_ids(bias: dict[str, float]) -> dict[str, float]:
    """JSON's keys are texts."""
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f'{key[:50]!r} is no token id; write whole numbers, as in {{"42": -5}}')
    return bias


TokenId = Annotated[int, Field(ge=0, le=LARGEST)]


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
    presence_penalty: float | None = _setting("presence_penalty", ge=-2, le=2)
    frequency_penalty: float | None = _setting("frequency_penalty", ge=-2, le=2)
    logit_bias: Annotated[dict[str, float], AfterValidator(_token_ids)] | None = Field(
        None, max_length=MOST_BIASED, description="Token ids with what is added to their logits [-100, 100]."
    )
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
    min_p: float | None = _setting("min_p", ge=0, le=1)
    repetition_penalty: float | None = _setting("repetition_penalty", ge=0.01, le=100)
    ignore_eos: bool | None = _setting("ignore_eos")
    min_tokens: int | None = _setting("min_tokens", ge=0, le=LARGEST)
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=MOST_STOPS, description="Token ids that end the answer, besides the checkpoint's own."
    )
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

    def told(self) -> Told:
        """What is told beside the answers."""
        return Told()

    def decode_config(self, own_stops: tuple[int, ...]) -> DecodeConfig:
        """The settings; what is left out has `DecodeConfig`'s default, so without a temperature decoding is greedy.

        `own_stops`: the checkpoint's stop tokens; those of the request are added to them, as vLLM does.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in DECODING if getattr(self, name) is not None}
        if self.stop_token_ids:
            given["stop_token_ids"] = (*self.stop_token_ids, *(() if self.ignore_eos else own_stops))
        bias = tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())
        return DecodeConfig(**given, logit_bias=bias, max_new_tokens=self.longest())


class ChatBody(ToolFields, Body):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = _setting("max_new_tokens", ge=1, le=LARGEST)
    logprobs: bool | None = Field(None, description="Tell every token's log-probability.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_TOP, description="With logprobs: those of so many most probable tokens as well."
    )

    @model_validator(mode="after")
    def _top_of_something(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true; set it, or leave top_logprobs out")
        return self

    def told(self) -> Told:
        """See `Body.told`."""
        return Told((self.top_logprobs or 0) if self.logprobs else None)

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
    max_tokens: int | None = Field(
        None, ge=0, le=LARGEST, description=help_of(DecodeConfig, "max_new_tokens") + " 0: with echo, the prompt alone."
    )
    logprobs: int | None = Field(
        None, ge=0, le=MOST_TOP, description="Tell every token's log-probability, and so many most probable ones'."
    )
    echo: bool | None = Field(None, description="The prompt stands before the answer, with its log-probabilities.")

    @model_validator(mode="after")
    def _something_to_tell(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 leaves nothing to tell; set echo=true, or ask for a token at least")
        return self

    def told(self) -> Told:
        """See `Body.told`."""
        echo = [prompt for prompt in self.prompts() for _ in range(self.n or 1)] if self.echo else None
        return Told(self.logprobs, echo, answers=self.max_tokens != 0)

    def longest(self) -> int | None:
        """The most tokens of an answer; with none, one is decoded all the same."""
        return 1 if self.max_tokens == 0 else self.max_tokens

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
