"""An adapter from scratch in two minutes: masks learn to draft what the model would say, on its own answers."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from parablock.checkpoints.load import load
from parablock.checkpoints.look import BUNDLED
from parablock.data.chat import IGNORE, Sample, encode_chat
from parablock.demo.config import DemoConfig
from parablock.diffusion.gate import attach, new_gate
from parablock.settings import Model
from parablock.training.config import AdaptConfig

ANSWERS = BUNDLED / "smollm2_answers.jsonl"  # the model's own, made by scripts/demo_answers.py
CHECKS = 10  # how often the drafts are checked
FIRST_STEPS = 4  # trained first, to know what a step takes on this machine
RECIPE = AdaptConfig(
    model="the demo's", data=ANSWERS.name, context="causal", draft_tokens=3, anchors=32, lora_rank=32, lora_alpha=32,
    batch_size=2, micro_batch_size=2, context_length=224, packing=False, lr=1.5e-3, warmup_steps=8,
)  # fmt: skip


@dataclass
class Live:
    """The live training as it went: what every check found, and when."""

    model: Model
    steps: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"steps": self.steps, "seconds": self.seconds, "log": self.log}


def train_live(config: DemoConfig, held_out: Sequence[tuple[list[int], list[int]]], console: Console) -> Live:
    """Train a new adapter for `live_minutes`; it is checked on `held_out`, prompts with the model's answers."""
    from transformers import TrainerCallback

    from parablock.training.draft_check import DraftCheck
    from parablock.training.trainer import padding_token, train

    model, tokenizer = load(config.ar)
    attach(model, new_gate(model, draft_tokens=RECIPE.draft_tokens, rank=RECIPE.lora_rank, alpha=RECIPE.lora_alpha))
    live, samples = Live(model), _samples(tokenizer)
    budget, started, accepted = 60 * config.live_minutes, time.perf_counter(), 0.0
    console.print(
        f"[bold]2 An adapter, trained here and now[/] for {config.live_minutes:g} min on {len(samples)} answers of the "
        "model itself. Its masks draft the next tokens; the model's own weights stay as they are. Checked on the "
        "answers above, which it never learns from:"
    )

    def checked(step: int, found: dict[str, float]) -> None:
        nonlocal accepted
        accepted = found["accepted"]

    def logged(step: int, logs: dict[str, float]) -> None:
        if "loss" in logs:
            note(live.steps, logs["loss"])

    def note(step: int, loss: float | None) -> None:
        seconds = time.perf_counter() - started
        per_forward = 1 + accepted
        live.log.append({"step": step, "seconds": seconds, "tokens_per_forward": per_forward})
        if loss is not None:
            live.log[-1]["loss"] = loss
        told = "" if loss is None else f"loss {loss:4.2f}"
        rise = "█" * round(20 * accepted)
        console.print(f"  {seconds:4.0f} s  step {step:4d}  {told:9s}  tokens per forward {per_forward:4.2f} {rise}")

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            live.steps += 1
            bar.update(task, completed=min(budget, time.perf_counter() - started))
            if time.perf_counter() - started > 1.15 * budget:  # a slow stretch must not make the demo late
                control.should_training_stop = True

    def run(steps: int, recipe: AdaptConfig, *callbacks: Any) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            train(
                model, tokenizer, samples, replace(recipe, steps=steps), scratch, progress=logged,
                callbacks=[Clock(), *callbacks],
            )  # fmt: skip

    padding = padding_token(model, tokenizer, RECIPE)
    answers = [Sample(p + a, [IGNORE] * len(p) + a) for p, a in held_out]
    columns = TextColumn("  training"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=budget)
        check = DraftCheck(model, answers, RECIPE, padding, checked)
        check.check(0)
        note(0, None)
        check_seconds = began = time.perf_counter() - started
        run(FIRST_STEPS, replace(RECIPE, seed=1, log_every=FIRST_STEPS + 1))
        step_seconds = (time.perf_counter() - started - began) / FIRST_STEPS
        left = budget - (time.perf_counter() - started) - CHECKS * check_seconds
        steps = max(CHECKS, int(left / step_seconds))
        recipe = replace(RECIPE, seed=config.seed, log_every=steps // CHECKS, check_every=steps // CHECKS)
        run(steps, recipe, DraftCheck(model, answers, recipe, padding, checked))
    live.seconds = time.perf_counter() - started
    return live


def _samples(tokenizer: Any) -> list[Sample]:
    """The shipped answers, as long as a row of the recipe."""
    chats = (encode_chat(tokenizer, json.loads(line)["messages"]) for line in ANSWERS.read_text().splitlines())
    length = RECIPE.context_length
    samples = [Sample(chat.input_ids[:length], chat.labels[:length]) for chat in chats]
    return [sample for sample in samples if sum(label != IGNORE for label in sample.labels) > RECIPE.draft_tokens]
