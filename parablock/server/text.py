"""Token ids as text while they arrive: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parablock.engine.request import Update

UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character


class Decoder:
    """Ids to text, piece by piece; all pieces together are the text of all ids.

    A tokenizer may write a token differently at the beginning of a text, so the last piece's ids are decoded once more
    with every new one. `marks`: special tokens that are text, too; others are left out.
    """

    def __init__(self, tokenizer: Any, marks: Mapping[int, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._marks = marks or {}
        self._ids: list[int] = []
        self._context = 0  # where the last piece begins ...
        self._told = 0  # ... and ends

    def push(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that is certain now; `last`: all the rest."""
        text, start = "", 0
        for at, token in enumerate(ids):
            if token in self._marks:
                text += self._more(ids[start:at], last=True) + self._marks[token]
                self._ids, self._context, self._told, start = [], 0, 0, at + 1
        return text + self._more(ids[start:], last=last)

    def _more(self, ids: Sequence[int], *, last: bool) -> str:
        self._ids += ids
        known = self._decode(self._ids[self._context : self._told])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(known) or (text.endswith(UNFINISHED) and not last):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class AnswerText:
    """The visible text of an answer: it ends before the first stop string, wherever the tokens' borders are."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], marks: Mapping[int, str] | None = None) -> None:
        self.stopped = False
        self._decoder = Decoder(tokenizer, marks)
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string

    def push(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that may be shown now; `last`: nothing more will come."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.push(ids, last=last)
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        shown = len(text) if last else len(text) - self._beginning_of_a_stop(text)
        self._held = text[shown:]
        return text[:shown]

    def _beginning_of_a_stop(self, text: str) -> int:
        """The longest end of `text` that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def denoising(tokenizer: Any, update: Update, prompt: int, end: int, *, speculative: bool = False) -> dict[str, Any]:
    """One step of the active block: every response position of it, with the text of what stands there.

    A character of several tokens is the text of its last one. `prompt`: tokens of the prompt; `end`: where the response
    ends at the latest, counted from the prompt's first token. `speculative`: with the drafts' texts, those that wait
    behind the last settled token and those that this step refused there, and their counts so far.
    """
    start = int(update.start)
    first, last = max(start, prompt), min(start + len(update.ids), end)
    window = slice(first - start, max(0, last - start))
    tokens, decoder = [], Decoder(tokenizer)
    for token, masked, revealed, confidence in zip(
        update.ids[window], update.masked[window], update.revealed[window], update.confidence[window], strict=True
    ):
        if masked:
            decoder = Decoder(tokenizer)
        tokens.append(
            {
                "text": "" if masked else decoder.push([int(token)]),
                "masked": bool(masked),
                "revealed": bool(revealed),
                "confidence": None if np.isnan(confidence) else round(float(confidence), 4),
            }
        )
    step = {"forward": update.forwards, "start": first - prompt, "tokens": tokens}
    return step | (_drafts(tokenizer, update, prompt) if speculative else {})


def _drafts(tokenizer: Any, update: Update, prompt: int) -> dict[str, Any]:
    """Refused drafts stand where the step's last token does, waiting ones behind it."""
    known = update.ids[: int(update.masked.argmax()) if update.masked.any() else None]
    known = known[max(0, prompt - int(update.start)) :].tolist()
    texts: dict[str, Any] = {}
    for name, before, ids in (("drafts", known, update.drafts), ("refused", known[:-1], update.refused)):
        decoder = Decoder(tokenizer)
        for token in before:
            decoder.push([token])
        texts[name] = [decoder.push([int(token)]) for token in ids[ids >= 0]]
    return {**texts, "drafted": update.drafted, "accepted": update.accepted}
