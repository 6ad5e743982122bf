"""An adapter from scratch in two minutes: masks learn to draft what the model would say, on its own answers."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from parablock.checkpoints.load import load
from parablock.data.chat import IGNORE, Sample, encode_chat
from parablock.demo.progress import bar
from parablock.demo.sizes import DemoConfig
from parablock.diffusion.gate import attach, new_gate
from parablock.settings import Model
from parablock.training.config import AdaptConfig
from parablock.training.draft_check import DraftCheck
from parablock.training.trainer import padding_token, train

# the model's own, made by scripts/demo_answers.py
ANSWERS = Path(__file__).parents[1] / "bundled" / "smollm2_answers.jsonl"
CHECKS = 6  # how often the drafts are checked
FIRST_STEPS = 4  # trained first, to know what a step takes on this machine
RECIPE = AdaptConfig(
    model="the demo's", data=ANSWERS.name, context="causal", draft_tokens=3, anchors=48, lora_rank=64, lora_alpha=64,
    lora_targets=("o_proj", "down_proj"), batch_size=1, micro_batch_size=1, context_length=224, packing=False, lr=4e-3,
    warmup_steps=8,
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
    with console.status("loading the model and its answers"):
        model, tokenizer = load(config.ar)
        gate = new_gate(
            model, draft_tokens=RECIPE.draft_tokens, rank=RECIPE.lora_rank, alpha=RECIPE.lora_alpha,
            targets=RECIPE.lora_targets,
        )  # fmt: skip
        attach(model, gate)
        samples = _samples(tokenizer)
    console.print(
        f"[bold]2 An adapter, trained here and now[/] for {config.live_minutes:g} min on {len(samples)} answers of the "
        "model: its masks learn to draft the next tokens, the model's own weights stay as they are. It is checked on "
        "the answers above, which it does not learn from:"
    )
    padding = padding_token(model, tokenizer, RECIPE)
    answers = [Sample(prompt + answer, [IGNORE] * len(prompt) + answer) for prompt, answer in held_out]
    with bar(console) as progress:
        clock = _Clock(Live(model), 60 * config.live_minutes, progress, console)

        def run(steps: int, seed: int, checks: int) -> None:
            every = steps // checks
            recipe = replace(RECIPE, steps=steps, seed=seed, check_every=every, log_every=every)
            check = DraftCheck(model, answers, replace(recipe, anchors=RECIPE.anchors // 2), padding, clock.checked)
            with tempfile.TemporaryDirectory() as scratch:
                train(model, tokenizer, samples, recipe, scratch, progress=clock.logged, callbacks=[clock, check])

        run(FIRST_STEPS, seed=config.seed + 1, checks=1)  # with one check: so its time is in the estimate
        a_step = clock.seconds / (FIRST_STEPS + 1)
        run(max(CHECKS, int((clock.budget - clock.seconds) / a_step)), seed=config.seed, checks=CHECKS)
    clock.live.seconds = clock.seconds
    return clock.live


class _Clock(TrainerCallback):
    """Stops a training that is late, and tells what the checks found."""

    def __init__(self, live: Live, budget: float, progress: Any, console: Console) -> None:
        self.live, self.budget, self.progress, self.console = live, budget, progress, console
        self.task = progress.add_task("training, seconds", total=round(budget))
        self.accepted = 0.0
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count; a slow stretch must not make the demo late."""
        self.live.steps += 1
        self.progress.update(self.task, completed=round(min(self.seconds, self.budget)))
        control.should_training_stop |= self.seconds > 1.15 * self.budget

    def checked(self, step: int, found: dict[str, float]) -> None:
        """Drafts accepted on the held-out answers: a forward makes as many tokens, and one more."""
        self.accepted = found["accepted"]

    def logged(self, step: int, logs: dict[str, float]) -> None:
        """After the check of the same step."""
        if "loss" not in logs:
            return
        entry = {"loss": logs["loss"], "tokens_per_forward": 1 + self.accepted}
        self.live.log.append({"step": self.live.steps, "seconds": self.seconds, **entry})
        self.console.print(
            f"  {self.seconds:4.0f} s  step {self.live.steps:4d}  loss {logs['loss']:5.2f}  "
            f"tokens per forward {1 + self.accepted:4.2f} {'█' * round(40 * self.accepted)}"
        )


def _samples(tokenizer: Any) -> list[Sample]:
    """The shipped answers, as long as a row of the recipe."""
    chats = (encode_chat(tokenizer, json.loads(line)["messages"]) for line in ANSWERS.read_text().splitlines())
    length = RECIPE.context_length
    samples = [Sample(chat.input_ids[:length], chat.labels[:length]) for chat in chats]
    return [sample for sample in samples if sum(label != IGNORE for label in sample.labels) > RECIPE.draft_tokens]
