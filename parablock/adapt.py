"""`parablock adapt`: a model, data and a recipe in; a block-diffusion checkpoint out."""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from parablock.checkpoints.load import load
from parablock.checkpoints.look import look
from parablock.checkpoints.save import save
from parablock.data.chat import IGNORE, Sample
from parablock.data.sources import Data, load_data
from parablock.data.word_problems import read_answer
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import generate
from parablock.diffusion.gate import attach, new_gate
from parablock.diffusion.support import is_adapted
from parablock.evals.machine import machine
from parablock.packed import pack
from parablock.settings import Model, require_library
from parablock.training.config import AdaptConfig
from parablock.training.cost import GPUS, Cost, Shape, estimate
from parablock.training.draft_check import DraftCheck
from parablock.training.mask_token import prepare
from parablock.training.preview import decoded
from parablock.training.recipe import write_recipe
from parablock.training.rows import RowDataset
from parablock.training.trainer import padding_token, train

CHECK_TOKENS = 256  # how long the answers of a check may get
MODEL, RUN, LOG = "model", "run", "log.jsonl"  # what an output folder holds, beside recipe.yaml and loss.png


def adapt(config: AdaptConfig, output: Path, console: Console, *, resume: bool = False, dry_run: bool = False) -> None:
    """Adapt `config.model` on `config.data`; the checkpoint is `output/model`.

    Under `torchrun` every process calls this; the first one prints and writes. With `dry_run` nothing is trained and
    nothing written: counts, fill rate, one row with its masks, and the cost are printed.

    Raises:
        ValueError: what `load`, `load_data` and `train` refuse, or an `output` that holds a run (without `resume`).
    """
    started = time.perf_counter()
    first = int(os.environ.get("RANK", "0")) == 0
    if first:  # the others may come when it has begun to write
        _require_free(output, resume or dry_run)
    console.quiet = not first
    model, tokenizer = _load(config, console)
    data = load_data(
        tokenizer, config.data, context_length=config.context_length, too_long=config.too_long,
        max_samples=config.max_samples, streaming=config.streaming, workers=config.data_workers,
    )  # fmt: skip
    held_out = min(config.check_samples, len(data.samples) // 2) if config.check_every else 0
    kept = _Slice(data.samples, held_out)
    lengths = None if data.lengths is None else data.lengths[held_out:]
    rows = RowDataset(kept, config, padding_token(model, tokenizer, config), lengths)
    _print_plan(config, model, tokenizer, data, rows, console)
    if dry_run:
        return
    output.mkdir(parents=True, exist_ok=True)
    if first:
        write_recipe(output / "recipe.yaml", config)
    log = _Log(output / LOG if first else None, config, rows, console)
    held = [data.samples[i] for i in range(held_out)]
    checks: list[TrainerCallback] = []
    if held and config.context == "causal":
        checks.append(DraftCheck(model, held, config, rows.pad_token_id, log))
    elif held:
        checks.append(_Check(model, tokenizer, held, config, log))
    with log:
        train(
            model, tokenizer, kept, config, output / RUN, lengths=lengths, resume=resume,
            progress=log, callbacks=checks,
        )  # fmt: skip
    if config.mode == "autoregressive":
        model.config.bd_size = None  # it is no block-diffusion checkpoint, or is no longer
    save(model, tokenizer, output / MODEL)
    if first:
        report = {"seconds": time.perf_counter() - started, **machine()}
        (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        _finish(output, console)


def _require_free(output: Path, may_hold_a_run: bool) -> None:
    if (output / MODEL).exists():
        raise ValueError(f"{str(output)!r} holds a finished run; name another folder")
    if not may_hold_a_run and output.exists() and any(output.iterdir()):
        raise ValueError(f"{str(output)!r} is not empty; pass --resume to continue the run there, or name a new folder")


def _load(config: AdaptConfig, console: Console) -> tuple[Model, Any]:
    """The model as it will be trained: with its mask token, LoRA or gate; frozen layers packed on a CPU."""
    checkpoint = look(config.model)
    if checkpoint.draft_tokens is not None and checkpoint.base is not None:
        own = f"model={config.model!r} is a causal adapter, whose model stays as it is"
        raise ValueError(f"{own}; adapt its base, {checkpoint.base.name}")
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # packed weights are not sharded
    if config.context == "causal":
        return _load_gated(config, device, packed=alone)
    dtype = torch.bfloat16 if config.lora_rank and config.bf16 else torch.float32  # frozen weights need no more
    model, tokenizer = load(config.model, dtype=dtype, device=device, packed=False)
    if config.mode == "diffusion" and (added := prepare(model, tokenizer, config.block_size)):
        console.print(f"added: {added}", soft_wrap=True)
    if config.lora_rank:
        require_library("peft", "train")
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(
                r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                target_modules=list(config.lora_targets) or "all-linear", task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
        if dtype == torch.float32 and alone:  # in bfloat16 the derivatives would cost more than products gain
            pack(model)
    return model, tokenizer


def _load_gated(config: AdaptConfig, device: str, packed: bool) -> tuple[Model, Any]:
    """The base in its own dtype, or in bfloat16 where asked for: it is not trained. The gate is float32."""
    dtype = torch.bfloat16 if config.bf16 else None
    model, tokenizer = load(config.model, dtype=dtype, device=device, packed=packed)
    if is_adapted(model.config):
        remedy = "context='causal' needs an autoregressive model"
        raise ValueError(f"{config.model!r} was adapted to block context; {remedy}, such as the one it was made of")
    gate = new_gate(
        model, draft_tokens=config.draft_tokens, rank=config.lora_rank, alpha=config.lora_alpha,
        targets=config.lora_targets, seed=config.seed,
    )  # fmt: skip
    attach(model, gate)
    return model, tokenizer


class _Slice(Sequence[Sample]):
    """The samples after the held-out ones."""

    def __init__(self, samples: Sequence[Sample], start: int) -> None:
        self.samples, self.start = samples, start

    def __len__(self) -> int:
        return len(self.samples) - self.start

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return self.samples[index + self.start]


def _print_plan(
    config: AdaptConfig, model: Model, tokenizer: Any, data: Data, rows: RowDataset, console: Console
) -> None:
    """What will be trained on, as it is: counts, fill, a row; and what it will cost."""
    seen = [rows.row(i, epoch=0) for i in range(min(len(rows.groups), 64))]
    learned = sum(int((row["labels"] != IGNORE).sum()) for row in seen)
    held = sum(len(row["labels"]) for row in seen)
    tokens = sum(len(rows.samples[n].input_ids) for i in range(len(seen)) for n in rows.groups[i])
    width = config.context_length * len(seen) if config.packing else held
    told = ", ".join(f"{count:,} {fate}" for fate, count in data.counts.items() if count)
    console.print(f"data: {told}; {len(rows.groups):,} rows of at most {config.context_length} tokens")
    console.print(
        f"fill rate {100 * tokens / width:.1f} %, {100 * learned / max(1, tokens):.0f} % of the tokens are learned; "
        f"{len(rows) / len(rows.groups):.2f} epochs in {config.steps:,} steps of {config.batch_size} rows",
        soft_wrap=True,
    )
    console.print(f"[dim]{decoded(seen[0], tokenizer, config)}[/]", highlight=False, soft_wrap=True)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = model.config
    only = None if trainable == parameters else trainable
    shape = Shape(parameters, own.num_hidden_layers, own.hidden_size, own.vocab_size, only)
    row = config.context_length if config.packing else held / len(seen)
    scaled = replace(config, context_length=max(config.block_size, round(row / config.block_size) * config.block_size))
    cost = estimate(shape, scaled, learned_share=learned / max(1, tokens), fill=tokens / width)
    console.print(cost_line(cost), soft_wrap=True)


def cost_line(cost: Cost) -> str:
    """The cost in words."""
    hours = ", ".join(f"{cost.gpu_hours(name):.3g} on {name}" for name in GPUS)
    return (
        f"cost: {cost.row_tokens:.3g} tokens of data, {cost.flops:.3g} FLOP; GPU-hours at 40 % of the peak: {hours}; "
        f"{cost.memory_gb:.3g} GB on one GPU without sharding"
    )


class _Log:
    """Every logged step to a file and to a live line."""

    def __init__(self, path: Path | None, config: AdaptConfig, rows: RowDataset, console: Console) -> None:
        self.path, self.config, self.console = path, config, console
        sample = [len(rows.row(i, epoch=0)["labels"]) for i in range(min(len(rows.groups), 16))]
        self.tokens_per_step = config.batch_size * sum(sample) / len(sample)
        self.start: tuple[int, float] | None = None
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("adapting", total=config.steps, figures="")

    def __enter__(self) -> "_Log":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, step: int, logs: dict[str, float]) -> None:
        if not {"loss", "tokens_per_forward", "accepted"} & logs.keys():
            return  # the Trainer's summary at the end
        entry = {"step": step, **{k: v for k, v in logs.items() if k not in ("step", "epoch", "total_flos")}}
        now = time.perf_counter()
        if "loss" in logs:
            if self.start is None:
                self.start = step, now
            elif step > self.start[0]:
                entry["tokens_per_second"] = (step - self.start[0]) * self.tokens_per_step / (now - self.start[1])
            speed = f", {entry['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in entry else ""
            figures = f"loss {logs['loss']:.4f}{speed}"
            self.bar.update(self.task, completed=step, figures=figures)
            if not self.console.is_terminal:
                self.console.print(f"step {step:6d}  {figures}")
        elif "tokens_per_forward" in logs:
            known = f"{100 * logs['accuracy']:.0f} % right, " if "accuracy" in logs else ""
            self.console.print(f"step {step:6d}  check: {known}{logs['tokens_per_forward']:.2f} tokens per forward")
        elif "accepted" in logs:
            places = " ".join(f"{share:.2f}" for name, share in logs.items() if name.startswith("accepted_"))
            self.console.print(f"step {step:6d}  check: accepted drafts per cycle {logs['accepted']:.2f} ({places})")
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


class _Check(TrainerCallback):
    """Answer held-out prompts while the model trains: tokens per forward, and how many final answers are right."""

    def __init__(self, model: Model, tokenizer: Any, samples: list[Sample], config: AdaptConfig, log: _Log) -> None:
        self.model, self.tokenizer, self.config, self.log = model, tokenizer, config, log
        self.prompts: list[list[int]] = []
        self.answers: list[str] = []
        for sample in samples:
            begin = next(i for i, label in enumerate(sample.labels) if label != IGNORE)
            if begin:  # plain text has no prompt
                self.prompts.append(sample.input_ids[:begin])
                self.answers.append(tokenizer.decode(sample.input_ids[begin:], skip_special_tokens=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every `check_every` steps."""
        if state.global_step % self.config.check_every or not self.prompts:
            return
        training = self.model.training
        self.model.eval()
        room = self.model.config.max_position_embeddings - max(map(len, self.prompts))
        limit = max(1, min(CHECK_TOKENS, room))
        sub_block = math.gcd(8, self.config.block_size)
        decode = DecodeConfig(mode=self.config.mode, max_new_tokens=limit, sub_block_size=sub_block)
        out = generate(self.model, self.prompts, decode)
        self.model.train(training)
        logs = {"tokens_per_forward": out.tokens_per_forward}
        truth = [read_answer(answer) for answer in self.answers]
        if all(t is not None for t in truth):
            texts = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out.tokens)
            logs["accuracy"] = sum(read_answer(text) == t for text, t in zip(texts, truth, strict=True)) / len(truth)
        self.log(state.global_step, logs)


def _finish(output: Path, console: Console) -> None:
    entries = (json.loads(line) for line in (output / LOG).read_text().splitlines())
    log = list({(entry["step"], "loss" in entry): entry for entry in entries}.values())  # a resumed run repeats steps
    pictured = ""
    if find_spec("matplotlib") is not None and any("loss" in entry for entry in log):
        from parablock.bench.plots import plot_losses

        plot_losses(output / "loss.png", log, "adaptation")
        pictured = ", loss.png"
    beside = f"recipe.yaml, report.json, {LOG}{pictured}"
    console.print(f"[bold]{output / MODEL}[/] is the checkpoint; beside it {beside}", soft_wrap=True)
    console.print(f"try it: parablock chat --model {output / MODEL}")
