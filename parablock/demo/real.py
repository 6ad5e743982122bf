"""The real model: its answers, and the same answers several tokens at a time, by adapters that draft for it."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from parablock.bench.compare import ALONE, Contender, Result, measure, take_turns
from parablock.bench.plots import plot_decoders, plot_denoising, plot_losses
from parablock.checkpoints.load import load
from parablock.checkpoints.look import look
from parablock.data.chat import encode_prompt
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import GenerateOutput, generate, stream
from parablock.demo.live import Live, train_live
from parablock.demo.progress import bar
from parablock.demo.sizes import DemoConfig
from parablock.engine.engine import Engine
from parablock.engine.request import Handle, Request
from parablock.settings import Model

QUESTIONS = {
    "letter": "Write a short letter to my dentist, asking for an earlier appointment.",
    "code": "Write a Python function that returns the longest line of a file.",
    "question": "Why do leaves change colour in autumn?",
    "arithmetic": "A ticket costs 7 dollars and a snack costs 5 dollars. How much do 4 tickets and 2 snacks cost? "
    "Think step by step.",
    "story": "Write a short story about a snail who wants to win a race.",
    "explanation": "Explain how a refrigerator keeps food cold.",
    "list": "List five things to pack for a weekend at the beach.",
    "rewriting": "Rewrite this text with correct spelling: Yesterday we goed to the lake with are dog. The wether was "
    "warm, and we swimmed untill the evening. On the way home we seen a big rainbow over the hils.",
}
BY_FORWARD = ("green", "bright_blue")  # the tokens of a forward, and of the next


def show_real(config: DemoConfig, console: Console) -> dict[str, Any] | None:
    """The story of the real model; returns its part of the report, None where the model is not installed."""
    try:
        look(config.model)
    except (ValueError, OSError) as error:
        console.print(f"The real model is left out: {error}\n", soft_wrap=True)
        return None
    asked = dict(itertools.islice(QUESTIONS.items(), config.questions))
    decode = DecodeConfig(mode="autoregressive", max_new_tokens=config.max_new_tokens)
    ar, tokenizer = load(config.ar)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in asked.values()]
    said = _answer(ar, tokenizer, asked, prompts, decode, console)
    held_out = [(prompt, out.tokens[0]) for prompt, out in zip(prompts, said, strict=True)]
    live = train_live(config, held_out, console) if config.live_minutes > 0 else None
    model, _ = load(config.model)
    drafts = DecodeConfig(mode="speculative", max_new_tokens=config.max_new_tokens)
    _draft(config, model, ar, tokenizer, asked, held_out, drafts, console)
    decoders = [Contender("autoregressive", ar, decode), Contender("drafts looked up, no adapter", ar, drafts)]
    if live is not None:
        decoders.append(Contender(f"adapter of {live.seconds / 60:.1f} min", live.model, drafts))
    decoders.append(Contender("bundled adapter", model, drafts))
    with bar(console) as progress:
        task = progress.add_task(f"{len(decoders)} decoders, the same questions", total=len(prompts))
        outputs = take_turns(decoders, prompts, lambda done: progress.update(task, completed=done))
    results = [measure(decoder, mine, outputs[0]) for decoder, mine in zip(decoders, outputs, strict=True)]
    _print_table(results, console)
    _draw(config, asked, results, outputs, live)
    steps = list(stream(model, prompts[0], drafts))
    took = f"{len(steps[-1].tokens())} tokens in {len(steps)} forwards (numbers: which one settled the token)"
    title = f"{next(iter(asked.values()))}\n{took}"
    plot_denoising(config.folder / "answer.png", tokenizer, len(prompts[0]), steps, title)
    return {
        "results": [result.as_dict() for result in results],
        "live": live and live.as_dict(),
        "questions": [
            {"kind": kind, "question": question, "decoders": [
                _told(decoder.name, ar, tokenizer, prompts[n], mine[n], outputs[0][n])
                for decoder, mine in zip(decoders, outputs, strict=True)
            ]} for n, (kind, question) in enumerate(asked.items())
        ],
    }  # fmt: skip


def _answer(
    ar: Model, tokenizer: Any, asked: dict[str, str], prompts: Sequence[list[int]], decode: DecodeConfig,
    console: Console,
) -> list[GenerateOutput]:  # fmt: skip
    """The model's own answers, printed as they come."""
    size = sum(p.numel() for p in ar.parameters()) / 1e6
    console.print(
        f"[bold]1 A real model[/] of {size:.0f}M parameters, in {_dtype(ar)}: {len(asked)} questions, answers of at "
        f"most {decode.max_new_tokens} tokens, autoregressive: one token per forward"
    )
    said = []
    with Engine(ar, ALONE) as engine:
        for question, prompt in zip(asked.values(), prompts, strict=True):
            console.print(Text(f"> {question}", style="bold"))
            with console.status("answering"):
                said.append(engine.generate(prompt, decode))
            text = tokenizer.decode(said[-1].tokens[0], skip_special_tokens=True)
            _print_short(Text(_in_line(text), style="dim"), console)
    tokens, seconds = sum(out.new_tokens for out in said), sum(out.seconds for out in said)
    console.print(f"{tokens} tokens in {seconds:.0f} s: {tokens / seconds:.0f} tokens/s\n")
    return said


def _draft(
    config: DemoConfig, model: Model, ar: Model, tokenizer: Any, asked: dict[str, str],
    held_out: Sequence[tuple[list[int], list[int]]], drafts: DecodeConfig, console: Console,
) -> None:  # fmt: skip
    """The same questions with the bundled adapter, and whether the answers are the same."""
    first, second = BY_FORWARD
    console.print(
        "\n[bold]3 The bundled adapter[/], trained for longer: it drafts, the model verifies, several tokens per "
        f"forward (those of one forward are [{first}]green[/], of the next [{second}]blue[/])"
    )
    parted: list[list[int]] = []
    with Engine(model, ALONE) as engine:
        for question, (prompt, said) in zip(asked.values(), held_out, strict=True):
            console.print(Text(f"> {question}", style="bold"))
            with console.status("answering"):
                handle = engine.submit(Request(prompt, drafts, stream=True))
                _print_short(_watch(tokenizer, handle), console)
            tokens, forwards = handle.result(), max(1, handle.forwards)
            told = f"{len(tokens)} tokens in {forwards} forwards, {len(tokens) / forwards:.2f} each"
            if tokens != said:
                parted.append(prompt)
                told += f"; {_parting(ar, tokenizer, prompt, said, tokens)}"
            console.print(Padding(Text(told, style="dim"), (0, 4)))
    console.print(
        f"[bold]{len(asked) - len(parted)} of {len(asked)}[/] answers are those of the model alone, token for token."
    )
    if parted and ar.dtype != torch.float32:
        same = _alike_in_float32(config, parted, drafts, console)
        console.print(
            f"Forwards of other widths round differently in {_dtype(ar)}: where two tokens are as good as equal, "
            f"either may be said. In float32, {same} of the other {len(parted)} are the same, too."
        )
    console.print()


def _alike_in_float32(config: DemoConfig, prompts: Sequence[list[int]], drafts: DecodeConfig, console: Console) -> int:
    """How many of these answers are the same with the adapter and without where rounding plays no part."""
    with console.status("the answers that differ, in float32"):
        said = []
        for name, decode in ((config.ar, replace(drafts, mode="autoregressive")), (config.model, drafts)):
            model, _ = load(name, dtype="float32")
            said.append([generate(model, prompt, decode).tokens for prompt in prompts])
    return sum(mine == others for mine, others in zip(*said, strict=True))


def _watch(tokenizer: Any, handle: Handle) -> Text:
    """An answer as it comes, coloured by forward."""
    tokens: list[int] = []
    text, shown = Text(), ""
    for number, update in enumerate(handle.updates()):
        tokens += update.tokens
        now = tokenizer.decode(tokens, skip_special_tokens=True)
        if not now.endswith("\ufffd"):  # a character whose bytes are not all there yet
            text.append(_in_line(now[len(shown) :]), style=BY_FORWARD[number % 2])
            shown = now
    return text


def _in_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _print_short(text: Text, console: Console) -> None:
    """An answer's beginning, on two lines."""
    text.truncate(2 * (console.width - 14), overflow="ellipsis")
    console.print(Padding(text, (0, 4), expand=False))


@torch.inference_mode()
def _parting(ar: Model, tokenizer: Any, prompt: list[int], said: list[int], other: list[int]) -> str:
    """Where two answers part, and how near the two tokens are to each other in the model's eyes."""
    place = next(n for n, (a, b) in enumerate(zip(said, other, strict=False)) if a != b)
    ids = torch.tensor([prompt + said[:place]], device=ar.device)
    scores = ar(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
    mine, others = float(scores[said[place]]), float(scores[other[place]])
    rounding = torch.finfo(ar.dtype).eps * 2.0 ** math.floor(math.log2(max(abs(mine), 1e-3)))
    words = [tokenizer.decode([token]) for token in (other[place], said[place])]
    return (
        f"token {place + 1} is {words[0]!r} for {words[1]!r}: their scores are {abs(mine - others):.2g} apart, "
        f"{_dtype(ar)} rounds there to {rounding:.2g}"
    )


def _dtype(model: Model) -> str:
    return str(model.dtype).removeprefix("torch.")


def _print_table(results: Sequence[Result], console: Console) -> None:
    table = Table(title="4 The same questions, one at a time, every decoder in turn", title_justify="left")
    table.add_column("decoder")
    for column in ("tokens/s", "tokens/forward", "speed-up (quartiles)", "same answers"):
        table.add_column(column, justify="right")
    for r in results:
        low, high = r.speed_up_range
        table.add_row(
            r.name,
            f"{r.tokens_per_second:.1f}",
            f"{r.tokens_per_forward:.2f}",
            f"{r.speed_up:.2f}x ({low:.2f} to {high:.2f})",
            f"{round(r.same_answers * r.prompts)} of {r.prompts}",
        )
    console.print(table)
    same = all(r.same_answers == 1 for r in results)
    alike = (
        "the same answers, token for token"
        if same
        else "the same answers but where rounding decides (report.json says where)"
    )
    console.print(f"With the bundled adapter: [bold]{results[-1].speed_up:.1f}x[/] as fast, {alike}.\n")


def _draw(
    config: DemoConfig, asked: dict[str, str], results: Sequence[Result],
    outputs: Sequence[Sequence[GenerateOutput]], live: Live | None,
) -> None:  # fmt: skip
    by_question = [[out.tokens_per_forward for out in mine] for mine in outputs]
    plot_decoders(config.folder / "decoders.png", results, list(asked), by_question)
    if live is not None:
        plot_losses(config.folder / "live.png", live.log, "an adapter trained live, checked on other answers")


def _told(
    name: str, ar: Model, tokenizer: Any, prompt: list[int], out: GenerateOutput, first: GenerateOutput
) -> dict[str, Any]:
    """One answer of one decoder, for the report."""
    tokens, said = out.tokens[0], first.tokens[0]
    parting = {} if tokens == said else {"differs": _parting(ar, tokenizer, prompt, said, tokens)}
    return {
        "name": name, "text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": len(tokens),
        "seconds": out.seconds, "tokens_per_forward": out.tokens_per_forward, "drafted_by": out.drafted_by,
        "accepted_by": out.accepted_by, **parting,
    }  # fmt: skip
