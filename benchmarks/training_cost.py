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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from common import setting, write
from official_layout import official_loss
from torch import Tensor

import parablock as pb
from parablock.data.chat import encode_chat
from parablock.data.word_problems import word_problem
from parablock.training.rows import RowDataset, collate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    model, tokenizer = pb.load("bundled", device="cpu")
    model.train()
    samples = [encode_chat(tokenizer, word_problem("train", 0, i).messages()) for i in range(args.batch)]
    rows = RowDataset(
        samples, block_size=32, context_length=256, pad_token_id=tokenizer.mask_token_id, packing=False, seed=0
    )
    batch = collate([rows[i] for i in range(args.batch)], tokenizer.mask_token_id)
    options = {"block_size": 32, "mask_token_id": model.config.mask_token_id}

    def with_attention(name: str, loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.set_attn_implementation(name)
            return loss(model, batch["input_ids"], batch["labels"], batch["noise_mask"], **options)

        return run

    contenders = {
        "published layout, sdpa": with_attention("sdpa", official_loss),
        "published layout, eager": with_attention("eager", official_loss),
        "parablock": with_attention("sdpa", pb.diffusion_loss),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, float] = {}
    for repeat in range(args.repeats + 1):
        for name, run in contenders.items():
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            loss = run()
            loss.backward()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            losses[name] = loss.item()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in contenders if name != "parablock"), key=lambda name: median[name])
    ratios = sorted(a / b for a, b in zip(seconds[best], seconds["parablock"], strict=True))
    shape = tuple(batch["input_ids"].shape)
    print(f"batch {shape}, {torch.get_num_threads()} threads, float32; medians of {args.repeats} interleaved repeats")
    for name in contenders:
        print(f"  {name:26s} {1000 * median[name]:7.0f} ms   loss {losses[name]:.7f}")
    print(f"speed-up over {best}: {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    write(
        "training_cost",
        {
            "setting": setting("python benchmarks/training_cost.py"),
            "batch": shape,
            "seconds": {name: {"median": median[name], "all": seconds[name]} for name in contenders},
            "loss": losses,
            "relative_loss_difference": abs(losses["parablock"] / losses[best] - 1),
            "baseline": best,
            "speed_up": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
        },
    )


if __name__ == "__main__":
    main()
