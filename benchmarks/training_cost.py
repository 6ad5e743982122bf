"""What one optimisation step costs: `parablock.diffusion_loss` against the published layout, same model, same batch.

    python benchmarks/training_cost.py

Forward and backward, in turns; the published layout gets the faster of the model's two attentions. Memory: the bytes
that the forward keeps for the backward (the weights aside). On the bundled model with its own task and with rows of
which half is prompt; with `--large-repeats`, also on random weights in the shape of Qwen2.5-0.5B (ten minutes, 12 GB).
Prints a table and writes `benchmarks/results/training_cost.json`.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import pandas as pd
import torch
from official_layout import official_loss
from torch import Tensor

import parablock as pb
from parablock.bench.shapes import random_model
from parablock.data.word_problems import EncodedProblems
from parablock.diffusion.noise import sample_noise
from parablock.diffusion.objective import autoregressive_loss
from parablock.training.rows import RowDataset, collate

Batch = dict[str, Tensor]


def task(tokenizer: Any, mask_token_id: int, samples: int, packing: bool, context: int) -> Batch:
    """Samples of the bundled task: one to a row, as its recipe trains, or packed into full rows."""
    encoded = list(EncodedProblems(tokenizer, seed=0, count=samples))
    config = pb.TrainConfig(context_length=context, packing=packing, isolate_samples=False)
    rows = RowDataset(encoded, config, mask_token_id)
    return collate([rows.row(i, epoch=0) for i in range(len(rows.groups))], mask_token_id)


def half_prompt(vocabulary: int, rows: int, length: int) -> Batch:
    """Random tokens; the first half of every row is prompt."""
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    noise = [sample_noise(length, 32, seed=0, epoch=0, sample=row) for row in range(rows)]
    return {"input_ids": ids, "labels": labels, "noise_mask": torch.stack(noise)}


def kept_bytes(model: Any, run: Callable[[], Tensor]) -> int:
    """What `run`'s forward keeps for its backward, in bytes: every storage once, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # alive, so that no storage is counted under the address of an earlier one

    def pack(tensor: Tensor) -> None:  # what is packed must not hold the tensor: a node's own output would never go
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        run()
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)


def with_ar_loss(model: Any, ids: Tensor, labels: Tensor, noise: Tensor, **options: Any) -> Tensor:
    """What `ar_loss_weight=0.5` trains."""
    loss = pb.diffusion_loss(model, ids, labels, noise, **options)
    return loss + 0.5 * autoregressive_loss(model, ids, labels, block_size=32)


def measure(model: Any, batch: Batch, repeats: int) -> dict[str, Any]:
    losses = {
        "published layout, sdpa": official_loss,
        "published layout, eager": official_loss,
        "parablock": pb.diffusion_loss,
        "parablock, AR loss beside": with_ar_loss,
    }
    data = [batch[field] for field in ("input_ids", "labels", "noise_mask")]
    options = {"block_size": 32, "mask_token_id": model.config.mask_token_id}
    runs = {name: partial(loss, model, *data, **options) for name, loss in losses.items()}
    found: dict[str, float] = {}
    memory: dict[str, int] = {}

    def run(name: str) -> None:
        loss = runs[name]()
        loss.backward()
        found[name] = loss.item()

    def step(name: str) -> float:
        model.zero_grad(set_to_none=True)
        model.set_attn_implementation("eager" if name.endswith("eager") else "sdpa")
        memory[name] = memory.get(name) or kept_bytes(model, runs[name])
        return common.seconds(partial(run, name))

    took = common.in_turns({name: partial(step, name) for name in runs}, repeats)
    median = {name: statistics.median(times) for name, times in took.items()}
    best = min((name for name in runs if name.startswith("published")), key=lambda name: median[name])
    return {
        "batch": tuple(batch["input_ids"].shape),
        "seconds": {name: {"median": median[name], "all": times} for name, times in took.items()},
        "kept_megabytes": {name: size / 1e6 for name, size in memory.items()},
        "ar_loss_cost": median["parablock, AR loss beside"] / median["parablock"],
        "memory_ratio": memory["parablock"] / memory[best],
        "loss": found,
        "relative_loss_difference": abs(found["parablock"] / found[best] - 1),
        "baseline": best,
        "speed_up": common.ratios(took[best], took["parablock"]),
    }


def main() -> None:
    args = common.options(__doc__, samples=24, repeats=9, large_repeats=0)
    model, tokenizer = pb.load("bundled-ar", device="cpu")  # where an adaptation starts
    of_task = partial(task, tokenizer, model.config.mask_token_id, args.samples)
    cases: dict[str, tuple[Batch, int]] = {
        "one sample a row": (of_task(False, 256), args.repeats),
        "packed rows": (of_task(True, 512), args.repeats),
        "half of a row is prompt": (half_prompt(600, 12, 256), args.repeats),
        "0.5B shape, half of a row is prompt": (half_prompt(151000, 1, 256), args.large_repeats),
    }
    report: dict[str, Any] = {"setting": common.setting(args)}
    for name, (batch, repeats) in cases.items():
        if name.startswith("0.5B") and repeats:
            model = random_model("0.5b", block_size=32, dtype=torch.float32, device="cpu")
        if repeats:
            report[name] = found = measure(model.train(), batch, repeats)
            medians = {contender: times["median"] for contender, times in found["seconds"].items()}
            table = {"seconds": medians, "megabytes kept": found["kept_megabytes"], "loss": found["loss"]}
            print(f"{name}: batch {found['batch']}, {repeats} repeats\n{pd.DataFrame(table)}", flush=True)
    common.write("training_cost", report)


if __name__ == "__main__":
    main()
