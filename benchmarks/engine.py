"""What the engine costs and gives: measures what `page.py performance` shows.

    python benchmarks/engine.py                # all parts, about half an hour on two cores
    python benchmarks/engine.py batch-one      # some of them

- batch-one: one request at a time, against the reference loop; when compiling has paid off;
- load: 1 to 128 requests in flight, AR against block diffusion (what `parablock bench` measures);
- context: milliseconds per step against the context, up to 8192 tokens.

Each part writes `benchmarks/results/engine-<part>.json`.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import common
import numpy as np
import torch
from scipy.stats import linregress
from torch import nn

import parablock as pb
from parablock.bench.config import BenchConfig
from parablock.bench.throughput import Workload, measure, summarise
from parablock.evals.word_problems import test_problems

KINDS: dict[str, tuple[str, int]] = {
    "AR, 1 token": ("autoregressive", 1),
    "sub-block, 8 tokens": ("diffusion", 8),
    "block, 32 tokens": ("diffusion", 32),
}
LENGTHS = (0, 1024, 2048, 4096, 8192)
bundled = partial(pb.load, device="cpu", dtype="float32")


def batch_one(problems: int, repeats: int) -> dict[str, Any]:
    """Milliseconds per answer, one at a time: the reference loop, the engine, the compiled engine, in turns."""
    report = {}
    for mode, name in (("diffusion", "bundled"), ("autoregressive", "bundled-ar")):
        with tempfile.TemporaryDirectory() as cache:  # compile as on the first day
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            report[mode] = _batch_one(name, pb.DecodeConfig(mode=mode), problems)
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    return report


def _batch_one(name: str, config: pb.DecodeConfig, problems: int) -> dict[str, Any]:
    (model, tokenizer), (other, _) = bundled(name), bundled(name)
    torch.set_num_threads(1)
    prompts = common.questions(tokenizer, test_problems(3, problems + 1))
    size = {"max_rows": 1, "prefix_cache": False, "block_size": 32}

    def answers(generate: Callable[..., pb.GenerateOutput], count: int | None = None) -> Iterator[pb.GenerateOutput]:
        return (generate(prompt, config) for prompt in prompts[:count])

    with (
        pb.Engine(model, pb.EngineConfig(**size)) as engine,
        pb.Engine(other, pb.EngineConfig(**size, compile=True)) as compiled,
    ):
        start_up = common.seconds(lambda: list(answers(compiled.generate, 8)))  # all shapes are met
        loop = partial(pb.generate, model)
        makers = {"reference loop": loop, "engine": engine.generate, "engine, compiled": compiled.generate}
        outputs = common.in_turns({name: partial(next, answers(make)) for name, make in makers.items()}, problems)
    assert all(len({str(out.tokens) for out in same}) == 1 for same in zip(*outputs.values(), strict=True))
    took = {name: [out.seconds for out in outs] for name, outs in outputs.items()}
    saved = statistics.mean(took["engine"]) - statistics.mean(took["engine, compiled"])
    return {
        "milliseconds_per_answer": {name: 1000 * statistics.median(values) for name, values in took.items()},
        "speed_up": {name: common.ratios(took["reference loop"], values) for name, values in took.items()},
        "start_up_seconds": start_up,
        "pays_off_after_requests": round(start_up / saved),
    }


def load(problems: int, repeats: int) -> dict[str, Any]:
    (diffusion, tokenizer), (ar, _) = bundled("bundled"), bundled("bundled-ar")
    prompts = common.questions(tokenizer, test_problems(1, 256))
    workload = Workload({"diffusion": diffusion, "autoregressive": ar}, prompts, 600)
    config = BenchConfig(concurrency=(1, 4, 16, 32, 64, 128), sub_block_sizes=(8, 32), compile=(True,), repeats=repeats)
    return {"rows": summarise(measure(workload, config, progress=lambda *now: print(*now, flush=True)))}


class Steps:
    """Denoising (or AR) steps of one request behind a long prompt, one at a time."""

    def __init__(self, model: Any, context: int, mode: Any, width: int) -> None:
        self.width, self.ran, self.predictions = width, 0, 0  # queries and predictions of the latest forward
        model.register_forward_pre_hook(self._note, with_kwargs=True)
        self.engine = pb.Engine(model, pb.EngineConfig(max_rows=1, max_context=context + 4096, prefix_cache=False))
        prompt = np.random.default_rng(0).integers(0, 600, context + 1).tolist()
        config = pb.DecodeConfig(
            mode=mode, max_new_tokens=2048, stop_token_ids=(), strategy="fixed", sub_block_cache=width < 32,
            sub_block_size=width,
        )  # fmt: skip
        handle = self.engine.submit(pb.Request(prompt, config))
        while handle.first_token is None:  # the prompt is read
            self.engine.step()

    def _note(self, model: Any, args: Any, kwargs: Any) -> None:
        self.ran, self.predictions = kwargs["input_ids"].shape[1], len(kwargs["logits_to_keep"])

    def one(self) -> float:
        """Seconds of the next step that runs as many tokens as asked."""
        while True:
            took = common.seconds(self.engine.step)
            if self.ran == self.width:
                return took


def context(problems: int, repeats: int) -> dict[str, Any]:
    """Step time against context, for 1 (AR), 8 (a sub-block) and 32 (a block) tokens, on the bundled model's shape."""
    model, _ = bundled("bundled")
    model.config.max_position_embeddings = 16384
    torch.set_num_threads(1)
    report: dict[str, Any] = {"kinds": {}}
    for kind, (mode, width) in KINDS.items():
        runs = {length: Steps(model, length, mode, width) for length in LENGTHS}
        seen = common.in_turns({str(n): run.one for n, run in runs.items()}, 20 * repeats)
        report["kv_bytes_per_token"] = runs[0].engine.runner.kv.bytes_per_token
        for run in runs.values():
            run.engine.close()
        times = [1000 * statistics.median(values) for values in seen.values()]
        line = linregress(LENGTHS, times)
        report["kinds"][kind] = {
            "lengths": LENGTHS, "milliseconds": times, "slope_ns_per_token": 1e6 * line.slope,
            "r_squared": line.rvalue**2,
        }  # fmt: skip
        print(kind, report["kinds"][kind], flush=True)
    data = torch.ones(2**26)  # what one thread reads from memory: 256 MB, summed
    report["bytes_per_second"] = data.numel() * 4 / statistics.median(common.seconds(data.sum) for _ in range(7))
    report["predicted_ns_per_token"] = 1e9 * report["kv_bytes_per_token"] / report["bytes_per_second"]
    report["attention_alone_ns_per_token"] = {str(width): attention_slope(width) for _, width in KINDS.values()}
    return report


def attention_slope(width: int) -> float:
    """Nanoseconds per K/V token of bare attention in all six layers: torch's own, on K/V that no cache holds."""
    times, other = {}, torch.ones(2**25)
    for length in (LENGTHS[1], LENGTHS[-1]):
        q = torch.randn(1, 2, 2 * width, 32)
        k, v = (torch.randn(6, length, 2, 32).transpose(1, 2)[:, None] for _ in range(2))
        attend = partial(map, partial(nn.functional.scaled_dot_product_attention, q), k, v)
        # before each, 128 MB pass through the caches
        times[length] = statistics.median((other.sum(), common.seconds(lambda a=attend: [*a()]))[1] for _ in range(30))
    return 1e9 * (times[LENGTHS[-1]] - times[LENGTHS[1]]) / (LENGTHS[-1] - LENGTHS[1])


if __name__ == "__main__":
    common.measure_parts(__doc__, batch_one, load, context, problems=100, repeats=5)
