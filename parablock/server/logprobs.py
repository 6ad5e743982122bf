"""Log-probabilities as OpenAI's JSON: what a token is as text and bytes, and where in the text it begins."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parablock.decoding.logprobs import TokenLogprob
from parablock.server.text import Decoder

LEAST = -9999.0  # stands for any log-probability below it, as in OpenAI's interface
SINGLE_BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Told:
    """What is told beside the answers.

    `logprobs`: how many most probable tokens beside every token; None: no log-probabilities. `echo`: the prompts, texts
    or ids, one per answer, which stand before the answers. `answers`: False, the prompts alone.
    """

    logprobs: int | None = None
    echo: Sequence[str | list[int]] | None = None
    answers: bool = True


@dataclass(frozen=True)
class ToldToken:
    """A token, what is told of it (None: nothing predicts a prompt's first one), and where its text begins."""

    token: int
    told: TokenLogprob | None
    offset: int


class Telling:
    """The tokens of one answer in order; each waits until the first character of its text is shown."""

    def __init__(self, tokenizer: Any) -> None:
        self._decoder = Decoder(tokenizer)
        self._waiting: list[ToldToken] = []
        self._length = 0  # characters that are certain

    def push(self, tokens: Sequence[int], told: Sequence[TokenLogprob | None]) -> None:
        """More tokens of the answer. A character of several tokens begins with the first of them."""
        for token, logprob in zip(tokens, told, strict=True):
            self._waiting.append(ToldToken(token, logprob, self._length))
            self._length += len(self._decoder.push([token]))

    def pop(self, shown: int | None) -> list[ToldToken]:
        """Those whose text begins before the `shown` first characters, each once; None: all the rest."""
        ready = len(self._waiting)
        if shown is not None:
            ready = next((i for i, said in enumerate(self._waiting) if said.offset >= shown), ready)
        taken, self._waiting = self._waiting[:ready], self._waiting[ready:]
        return taken


class Tokens:
    """A tokenizer's tokens as bytes: also of those that are a part of a character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = repr(tokenizer.backend_tokenizer.decoder)
        self._byte_level, self._byte_fallback = "ByteLevel" in decoder, "ByteFallback" in decoder
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The token's own bytes; of a special token those of its name; none of an id without a token."""
        if token not in self._known:
            self._known[token] = self._bytes_of(token)
        return self._known[token]

    def _bytes_of(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._tokenizer.added_tokens_decoder:
            return str(piece).encode()
        if self._byte_level and all(character in BYTES for character in piece):
            return bytes(BYTES[character] for character in piece)
        if self._byte_fallback:
            single = SINGLE_BYTE.fullmatch(piece)
            return bytes.fromhex(single[1]) if single else piece.replace("\u2581", " ").encode()
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text.encode()

    def text_of(self, token: int) -> str:
        """The token as text; bytes that are none are spelled out, as in OpenAI's completions."""
        own = self.bytes_of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def chat(self, said: Sequence[ToldToken]) -> dict[str, Any]:
        """`logprobs` of a chat's choice."""
        content = []
        for one in said:
            assert one.told is not None
            top = [self._entry(token, logprob) for token, logprob in one.told.top]
            content.append({**self._entry(one.token, one.told.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.text_of(token), "logprob": max(logprob, LEAST), "bytes": list(self.bytes_of(token)),
        }  # fmt: skip

    def completion(self, said: Sequence[ToldToken]) -> dict[str, Any]:
        """`logprobs` of a completion's choice; the token itself is always among the most probable ones."""
        told = [one.told for one in said]
        return {
            "tokens": [self.text_of(one.token) for one in said],
            "token_logprobs": [None if t is None else max(t.logprob, LEAST) for t in told],
            "top_logprobs": [None if one.told is None else self._top(one.token, one.told) for one in said],
            "text_offset": [one.offset for one in said],
        }

    def _top(self, token: int, told: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for number, logprob in (*told.top, (token, told.logprob)):  # of equal texts the most probable one
            top.setdefault(self.text_of(number), max(logprob, LEAST))
        return top


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (GPT-2's): printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_alphabet()
