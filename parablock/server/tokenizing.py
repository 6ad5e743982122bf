"""`/tokenize` and `/detokenize`, as vLLM has them."""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field, model_validator

from parablock.data.chat import encode_text
from parablock.server.conversation import beside, chat_prompt
from parablock.server.errors import ApiError
from parablock.server.protocol import Message
from parablock.server.served import ServedModel
from parablock.server.strict import Strict, Text
from parablock.server.tools import MOST, Tool


class TokenizeBody(Strict):
    """`POST /tokenize`: a text, or a chat."""

    model: str | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, max_length=MOST)
    add_generation_prompt: bool | None = Field(
        None, description="Up to where the answer starts; the default, in a chat."
    )
    add_special_tokens: bool | None = Field(None, description="As a text begins; the default, in a text.")
    return_token_strs: bool | None = None
    continue_final_message: Literal[False] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages is needed, and not both; pass one of them")
        if self.prompt is not None and (self.tools or self.add_generation_prompt):
            raise ValueError("tools and add_generation_prompt belong to messages; leave them out")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens belongs to prompt, a chat template writes its own; leave it out")
        return self


class DetokenizeBody(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class Tokens(Strict):
    """What a text or chat consists of."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Strict):
    """A text."""

    prompt: str


async def tokenize(served: ServedModel, body: TokenizeBody) -> Tokens:
    """The ids that the same prompt has in a request."""
    tokenizer = served.tokenizer
    if body.prompt is not None:
        encode = partial(encode_text, begin=body.add_special_tokens is not False)
        tokens = await beside(encode, len(body.prompt), tokenizer, body.prompt)
    else:
        messages = [message.plain() for message in body.messages or []]
        shown = [tool.function for tool in body.tools or []]
        begins = body.add_generation_prompt is not False
        tokens = await chat_prompt(tokenizer, served.tool_format, messages, shown, add_generation_prompt=begins)
    texts = tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return Tokens(count=len(tokens), max_model_len=served.engine.max_context, tokens=tokens, token_strs=texts)


async def detokenize(served: ServedModel, body: DetokenizeBody) -> Detokenized:
    """The text of these ids, special tokens included.

    Raises:
        ApiError: an id that the tokenizer does not have.
    """
    known = len(served.tokenizer)
    if (highest := max(body.tokens, default=0)) >= known:
        raise ApiError(400, f"tokens: {highest} is no token of {served.name}; the last one is {known - 1}", "tokens")
    return Detokenized(prompt=await beside(served.tokenizer.decode, 5 * len(body.tokens), body.tokens))
