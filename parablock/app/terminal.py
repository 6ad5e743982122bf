"""`parablock generate`, one answer, and `chat`: a conversation in the terminal; answers appear as they are decoded."""

import contextlib
import json
import time
from typing import Any

from rich.console import Console

from parablock.checkpoints.load import load
from parablock.data.chat import encode_prompt
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import generate, stream
from parablock.decoding.grammar import Grammar, Grammars


def answer_once(
    model: str, text: str, config: DecodeConfig, grammar: Grammar | None = None, *, raw: bool, as_json: bool,
    dtype: str | None,
) -> None:  # fmt: skip
    """Print the answer to a prompt (`raw`: without the chat template), or one JSON object with text and figures."""
    loaded, tokenizer = load(model, dtype=dtype)
    held = None if grammar is None else Grammars(tokenizer).compile(grammar)
    if raw or tokenizer.chat_template is None:
        ids = tokenizer(text)["input_ids"]
    else:
        ids = encode_prompt(tokenizer, [{"role": "user", "content": text.strip()}])
    out = generate(loaded, ids, config, grammar=held)
    answer = tokenizer.decode(out.tokens[0], skip_special_tokens=True)
    if as_json:
        figures = {
            "new_tokens": out.new_tokens, "forwards": out.forwards, "seconds": round(out.seconds, 4),
            "tokens_per_forward": round(out.tokens_per_forward, 3),
            "tokens_per_second": round(out.tokens_per_second, 1),
            "drafted": out.drafted[0], "accepted": out.accepted[0],
            "drafted_by": out.drafted_by, "accepted_by": out.accepted_by,
        }  # fmt: skip
        print(json.dumps({"model": model, "text": answer, "tokens": out.tokens[0], **figures}, ensure_ascii=False))
    else:
        print(answer)


def chat(model: str, config: DecodeConfig, *, history: bool, dtype: str | None) -> None:
    """Read questions until `exit` or the end of input.

    `clear` forgets the conversation; with `history=False` every question stands alone.
    """
    loaded, tokenizer = load(model, dtype=dtype)
    console = Console(highlight=False)
    with contextlib.suppress(ImportError):  # not on Windows; input() works without
        import readline  # noqa: F401  (arrow keys and history in input())
    console.print("[dim]type a question; 'clear' forgets the conversation, 'exit' leaves[/]")
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question == "exit":
            return
        if question == "clear" or not history:
            messages = []
        if question in ("", "clear"):
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = _answer(loaded, tokenizer, messages, config, console)
        except ValueError as error:
            console.print(f"{error} ('clear' forgets the conversation)", style="red", markup=False)
            messages.pop()
            continue
        except KeyboardInterrupt:
            console.print("\n[dim](stopped)[/]")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], config: DecodeConfig, console: Console) -> str:
    """Decode the answer to `messages`, printing every stretch of text as soon as no mask stands before it."""
    prompt = encode_prompt(tokenizer, messages)
    started = time.perf_counter()
    text = shown = ""
    for step in stream(model, prompt, config):
        text = tokenizer.decode(step.tokens(), skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            console.file.write(text[len(shown) :])
            console.file.flush()
            shown = text
    console.file.write(text[len(shown) :])
    seconds = time.perf_counter() - started
    tokens, forwards = len(step.tokens()), max(1, int(step.decode_forwards[0]))
    console.file.write("\n")
    drafts = f", {step.accepted[0]} of {step.drafted[0]} drafts accepted" if step.drafted[0] else ""
    console.print(
        f"[dim]{tokens} tokens, {tokens / seconds:.0f} tokens/s, {tokens / forwards:.2f} tokens per forward{drafts}[/]",
        soft_wrap=True,
    )
    return text
