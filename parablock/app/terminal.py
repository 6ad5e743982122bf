"""`parablock chat`: a conversation in the terminal; answers appear as they are decoded."""

import contextlib
import time
from typing import Any

from rich.console import Console

from parablock.data.chat import encode_prompt
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import stream


def chat(model: Any, tokenizer: Any, config: DecodeConfig, console: Console, *, history: bool) -> None:
    """Read questions until `exit` or the end of input.

    `clear` forgets the conversation; with `history=False` every question stands alone.
    """
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
            answer = _answer(model, tokenizer, messages, config, console)
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
    console.print(
        f"[dim]{tokens} tokens, {tokens / seconds:.0f} tokens/s, {tokens / forwards:.2f} tokens per forward[/]"
    )
    return text
