"""Chat messages -> token ids and labels: only what the assistant says is learned."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT = "\ufdd0"  # no character: Unicode keeps it for a program's own use
IGNORE = -100  # the label of a position that is no target

Message = Mapping[str, str]


@dataclass(frozen=True)
class Sample:
    """One chat as ids and labels of equal length; `labels[i]` is `input_ids[i]` where learned, else -100."""

    input_ids: list[int]
    labels: list[int]


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> Sample:
    """Render `messages` with the tokenizer's chat template; label the assistant turns, end-of-turn token included.

    Every turn is tokenized on its own, so the ids up to an answer are exactly those that `encode_prompt` gives for the
    same conversation at inference time. What the template writes after the last end-of-turn token is dropped.

    Raises:
        ValueError: no assistant message, or a template that rewrites earlier turns.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("the conversation has no assistant message to learn; add one with role 'assistant'")
    input_ids: list[int] = []
    labels: list[int] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:i], add_generation_prompt=True)
        answer = _end_of_turn(tokenizer, render(tokenizer, messages[: i + 1], add_generation_prompt=False))
        if not prompt.startswith(done) or not answer.startswith(prompt):
            raise ValueError(
                f"the chat template rewrites earlier turns (assistant message {i}), so its answer cannot be told "
                "from the prompt; train on conversations that end with this message, or use another template"
            )
        for text, learned in ((prompt[len(done) :], False), (answer[len(prompt) :], True)):
            ids = encode_rendered(tokenizer, text)
            input_ids += ids
            labels += ids if learned else [IGNORE] * len(ids)
        done = answer
    return Sample(input_ids, labels)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation up to where the assistant's next answer starts.

    A special token that is spelled out in a message is text: it ends no turn and is no mask.
    """
    return encode_rendered(tokenizer, render(tokenizer, messages, add_generation_prompt=True))


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, begin: bool = True) -> list[int]:
    """The ids of a text; special tokens that are spelled out are text, too.

    `begin`: with the special tokens with which the tokenizer begins a text.
    """
    first, *rest = _cut(_spelled(tokenizer), text).split(CUT)
    ids: list[int] = list(tokenizer(first, add_special_tokens=begin)["input_ids"])
    return ids + [i for piece in rest for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """A conversation as the template writes it, with a cut (`CUT`) inside every special token spelled out in it.

    `tools`: functions as JSON schemas, for templates that know some.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template")
    special = _spelled(tokenizer)
    text = tokenizer.apply_chat_template(
        _cut_all(special, messages),
        tools=None if tools is None else _cut_all(special, tools),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert isinstance(text, str)
    return text


def _spelled(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Where a special token is spelled out."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    spelled = "|".join(re.escape(s) for s in sorted(special | set(tokenizer.all_special_tokens)) if len(s) > 1)
    return re.compile(f"(?={spelled}).") if spelled else None


def _cut(special: re.Pattern[str] | None, text: str) -> str:
    """`text` with a cut inside every special token that is spelled out in it, so that none is read as one."""
    text = text.replace(CUT, "")
    return special.sub(rf"\g<0>{CUT}", text) if special else text


def _cut_all(special: re.Pattern[str] | None, value: Any) -> Any:
    """The same for all texts in messages or tools."""
    if isinstance(value, str):
        return _cut(special, value)
    if isinstance(value, Mapping):
        return {_cut_all(special, key): _cut_all(special, entry) for key, entry in value.items()}
    return [_cut_all(special, entry) for entry in value] if isinstance(value, list | tuple) else value


def encode_rendered(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a rendered text; what a cut separates shares no token."""
    return [i for piece in text.split(CUT) for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """`text` up to its last end-of-sequence token."""
    eos = str(tokenizer.eos_token)
    end = text.rfind(eos)
    return text if end < 0 else text[: end + len(eos)]
