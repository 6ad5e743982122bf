"""What one optimisation step costs: `parablock.diffusion_loss` against the published layout, same model, same batch.

    python benchmarks/training_cost.py

Forward and backward, in turns; the published layout gets the faster of the model's two attentions. Memory: the bytes
that the forward keeps for the backward (the weights aside). On the bundled model with its own task and with rows of
which half is prompt; with `--large-repeats`, also on random weights in the shape of Qwen2.5-0.5B. Prints a table, then
one JSON line, and writes `benchmarks/results/training_cost.json`.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from common import setting, write
from official_layout import official_loss
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import parablock as pb
from parablock.data.word_problems import EncodedProblems
from parablock.diffusion.noise import sample_noise
from parablock.diffusion.objective import autoregressive_loss
from parablock.training.rows import RowDataset, collate

Batch = dict[str, Tensor]
LARGE = {
    "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "tie_word_embeddings": True,
}  # fmt: skip


def make_batches(tokenizer: Any, mask_token_id: int, samples: int) -> dict[str, Batch]:
    """The same samples, one to a row as the bundled recipe trains, and packed into full rows of 512."""
    encoded = list(EncodedProblems(tokenizer, seed=0, count=samples))
    batches = {}
    for name, packing, context in (("one sample a row", False, 256), ("packed rows", True, 512)):
        config = pb.TrainConfig(context_length=context, packing=packing, isolate_samples=False)
        rows = RowDataset(encoded, config, mask_token_id)
        batches[name] = collate([rows.row(i, epoch=0) for i in range(len(rows.groups))], mask_token_id)
    return batches


def half_prompt(vocabulary: int, rows: int, length: int) -> Batch:
    """Random tokens; the first half of every row is prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    noise = [sample_noise(length, 32, seed=0, epoch=0, sample=row) for row in range(rows)]
    return {"input_ids": ids, "labels": labels, "noise_mask": torch.stack(noise)}


def kept_bytes(model: Any, run: Callable[[], Tensor]) -> int:
    """What `run`'s forward keeps for its backward, in bytes: every storage once, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    alive: list[Tensor] = []  # so that no storage is counted under the address of an earlier one

    def pack(tensor: Tensor) -> None:  # what is packed must not hold the tensor: a node's own output would never go
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())

    def unpack(packed: None) -> Tensor:
        raise RuntimeError("this forward is only measured")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        run()
    return sum(kept.values())


def with_ar_loss(model: Any, ids: Tensor, labels: Tensor, noise: Tensor, **options: Any) -> Tensor:
    """What `ar_loss_weight=0.5` trains."""
    loss = pb.diffusion_loss(model, ids, labels, noise, **options)
    return loss + 0.5 * autoregressive_loss(model, ids, labels, block_size=32)


def measure(model: Any, batch: Batch, repeats: int) -> dict[str, Any]:
    options = {"block_size": 32, "mask_token_id": model.config.mask_token_id}
    contenders: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "published layout, sdpa": ("sdpa", official_loss),
        "published layout, eager": ("eager", official_loss),
        "parablock": ("sdpa", pb.diffusion_loss),
        "parablock, AR loss beside": ("sdpa", with_ar_loss),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, float] = {}
    memory: dict[str, int] = {}
    for repeat in range(repeats + 1):
        for name, (attention, loss_function) in contenders.items():
            model.zero_grad(set_to_none=True)
            model.set_attn_implementation(attention)
            run = partial(loss_function, model, batch["input_ids"], batch["labels"], batch["noise_mask"], **options)
            if not repeat:
                memory[name] = kept_bytes(model, run)
            started = time.perf_counter()
            loss = run()
            loss.backward()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            losses[name] = loss.item()
            del loss
    median = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in contenders if name.startswith("published")), key=lambda name: median[name])
    ratios = sorted(a / b for a, b in zip(seconds[best], seconds["parablock"], strict=True))
    return {
        "batch": tuple(batch["input_ids"].shape),
        "seconds": {name: {"median": median[name], "all": seconds[name]} for name in contenders},
        "kept_megabytes": {name: size / 1e6 for name, size in memory.items()},
        "ar_loss_cost": median["parablock, AR loss beside"] / median["parablock"],
        "memory_ratio": memory["parablock"] / memory[best],
        "loss": losses,
        "relative_loss_difference": abs(losses["parablock"] / losses[best] - 1),
        "baseline": best,
        "speed_up": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--large-repeats", type=int, default=0, help="of the 0.5B shape (ten minutes, 12 GB)")
    args = parser.parse_args()
    model, tokenizer = pb.load("bundled-ar", device="cpu")  # where an adaptation starts
    batches = make_batches(tokenizer, model.config.mask_token_id, args.samples)
    batches["half of a row is prompt"] = half_prompt(600, 12, 256)
    cases: list[tuple[str, Any, Batch, int]] = [(name, model, batch, args.repeats) for name, batch in batches.items()]
    if args.large_repeats:
        cases.append(("0.5B shape, half of a row is prompt", None, {}, args.large_repeats))
    report = {}
    for name, model, batch, repeats in cases:
        if model is None:
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(Qwen2Config(**LARGE))
            model.config.mask_token_id = 151665
            batch = half_prompt(151000, 1, 256)
        model.train()
        report[name] = result = measure(model, batch, repeats)
        print(f"{name}: batch {result['batch']}, {torch.get_num_threads()} threads, float32, {repeats} repeats")
        for contender, times in result["seconds"].items():
            kept = result["kept_megabytes"][contender]
            loss = result["loss"][contender]
            print(f"  {contender:26s} {1000 * times['median']:7.0f} ms  {kept:8.0f} MB kept  loss {loss:.6f}")
        ratio = result["speed_up"]
        print(f"  {ratio['median']:.2f}x faster than {result['baseline']} ({ratio['min']:.2f} to {ratio['max']:.2f}),")
        print(
            f"  {result['memory_ratio']:.2f}x its memory; the AR loss costs {result['ar_loss_cost']:.2f}x", flush=True
        )
    write("training_cost", {"setting": setting("python benchmarks/training_cost.py"), **report})


if __name__ == "__main__":
    main()
