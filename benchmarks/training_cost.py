"""What one optimisation step costs: `parablock.diffusion_loss` against the published layout, same model, same batch.

    python benchmarks/training_cost.py

Forward and backward, in turns; the published layout gets the faster of the model's two attentions. Prints a table, then
one JSON line, and writes `benchmarks/results/training_cost.json`.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from common import setting, write
from official_layout import official_loss
from torch import Tensor

import parablock as pb
from parablock.data.word_problems import EncodedProblems
from parablock.training.rows import RowDataset, collate

Batch = dict[str, Tensor]


def make_batches(tokenizer: Any, mask_token_id: int, samples: int) -> dict[str, Batch]:
    """The same samples, one to a row as the bundled recipe trains, and packed into full rows of 512."""
    encoded = list(EncodedProblems(tokenizer, seed=0, count=samples))
    batches = {}
    for name, packing, context in (("one sample a row", False, 256), ("packed rows", True, 512)):
        config = pb.TrainConfig(context_length=context, packing=packing, isolate_samples=False)
        rows = RowDataset(encoded, config, mask_token_id)
        batches[name] = collate([rows.row(i, epoch=0) for i in range(len(rows.groups))], mask_token_id)
    return batches


def measure(model: Any, batch: Batch, repeats: int) -> dict[str, Any]:
    options = {"block_size": 32, "mask_token_id": model.config.mask_token_id}
    contenders: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "published layout, sdpa": ("sdpa", official_loss),
        "published layout, eager": ("eager", official_loss),
        "parablock": ("sdpa", pb.diffusion_loss),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, float] = {}
    for repeat in range(repeats + 1):
        for name, (attention, loss_function) in contenders.items():
            model.zero_grad(set_to_none=True)
            model.set_attn_implementation(attention)
            started = time.perf_counter()
            loss = loss_function(model, batch["input_ids"], batch["labels"], batch["noise_mask"], **options)
            loss.backward()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            losses[name] = loss.item()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in contenders if name != "parablock"), key=lambda name: median[name])
    ratios = sorted(a / b for a, b in zip(seconds[best], seconds["parablock"], strict=True))
    return {
        "batch": tuple(batch["input_ids"].shape),
        "seconds": {name: {"median": median[name], "all": seconds[name]} for name in contenders},
        "loss": losses,
        "relative_loss_difference": abs(losses["parablock"] / losses[best] - 1),
        "baseline": best,
        "speed_up": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    model, tokenizer = pb.load("bundled-ar", device="cpu")  # where an adaptation starts
    model.train()
    report = {}
    for name, batch in make_batches(tokenizer, model.config.mask_token_id, args.samples).items():
        report[name] = result = measure(model, batch, args.repeats)
        print(f"{name}: batch {result['batch']}, {torch.get_num_threads()} threads, float32, {args.repeats} repeats")
        for contender, times in result["seconds"].items():
            print(f"  {contender:26s} {1000 * times['median']:7.0f} ms   loss {result['loss'][contender]:.6f}")
        ratio = result["speed_up"]
        print(f"  {ratio['median']:.2f}x faster than {result['baseline']} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    write("training_cost", {"setting": setting("python benchmarks/training_cost.py"), **report})


if __name__ == "__main__":
    main()
