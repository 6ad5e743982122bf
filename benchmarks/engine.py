"""What the engine costs and gives, and `docs/performance.md` from it.

    python benchmarks/engine.py                # all parts, about half an hour on two cores
    python benchmarks/engine.py batch-one      # some of: batch-one, load, context, large, documents

- batch-one: one request at a time, against the reference loop; when compiling has paid off;
- load: 1 to 128 requests in flight, AR against block diffusion (what `parablock bench` measures);
- context: milliseconds per step against the context, up to 8192 tokens;
- large: a denoising step in the shape of Qwen2.5-0.5B, against a bare forward of the same matrices.

Each part writes `benchmarks/results/engine-<part>.json`; `documents` turns them into the page and its pictures.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from common import PICTURES, RESULTS, setting, write
from torch import Tensor, nn

import parablock as pb
from parablock.bench.config import BenchConfig
from parablock.bench.plots import plot_concurrency, plot_steps
from parablock.bench.shapes import random_model
from parablock.bench.throughput import Workload, markdown, measure, summarise
from parablock.data.chat import encode_prompt
from parablock.evals.word_problems import test_problems

BUNDLED_SHAPE = {
    "model_type": "qwen2", "vocab_size": 640, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 384, "tie_word_embeddings": True, "max_position_embeddings": 16384,
}  # fmt: skip
KINDS: dict[str, tuple[str, int]] = {
    "AR, 1 token": ("autoregressive", 1),
    "sub-block, 8 tokens": ("diffusion", 8),
    "block, 32 tokens": ("diffusion", 32),
}
DOCUMENT = PICTURES.parent / "performance.md"


def bundled(name: str) -> tuple[Any, Any]:
    return pb.load(name, device="cpu", dtype="float32")


def interleaved(contenders: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each contender returns, in turns, after a warm-up."""
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repeat in range(repeats + 1):
        for turn in range(len(names)):
            name = names[(repeat + turn) % len(names)]
            value = contenders[name]()
            if repeat:
                seen[name].append(value)
    return seen


def spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "low": quartiles[0], "high": quartiles[2]}


def batch_one(problems: int) -> dict[str, Any]:
    """Seconds per answer, one at a time: the reference loop, the engine, the compiled engine, in turns."""
    report = {}
    for mode, name in (("diffusion", "bundled"), ("autoregressive", "bundled-ar")):
        with tempfile.TemporaryDirectory() as cache:  # compile as on the first day
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            report[mode] = _batch_one(bundled(name), bundled(name)[0], pb.DecodeConfig(mode=mode), problems)
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        print(mode, json.dumps(report[mode], indent=1), flush=True)
    return report


def _batch_one(loaded: tuple[Any, Any], other: Any, config: pb.DecodeConfig, problems: int) -> dict[str, Any]:
    model, tokenizer = loaded
    torch.set_num_threads(1)
    prompts = [encode_prompt(tokenizer, p.messages()[:1]) for p in test_problems(3, problems)]
    size = {"max_rows": 1, "prefix_cache": False, "block_size": 32}
    with (
        pb.Engine(model, pb.EngineConfig(**size)) as engine,
        pb.Engine(other, pb.EngineConfig(**size, compile=True)) as compiled,
    ):
        started = time.perf_counter()
        for prompt in prompts[:8]:  # all shapes are met
            compiled.generate(prompt, config)
        start_up = time.perf_counter() - started
        makers: dict[str, Callable[[list[int]], pb.GenerateOutput]] = {
            "reference loop": lambda p: pb.generate(model, p, config),
            "engine": lambda p: engine.generate(p, config),
            "engine, compiled": lambda p: compiled.generate(p, config),
        }
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        for number, prompt in enumerate(prompts):
            tokens = []
            for turn in range(len(makers)):
                name = list(makers)[(number + turn) % len(makers)]
                out = makers[name](prompt)
                seconds[name].append(out.seconds)
                tokens.append(out.tokens)
            assert tokens[0] == tokens[1] == tokens[2]
    saved = statistics.mean(seconds["engine"]) - statistics.mean(seconds["engine, compiled"])
    return {
        "milliseconds_per_answer": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
        "speed_up": {
            name: spread([a / b for a, b in zip(seconds["reference loop"], values, strict=True)])
            for name, values in seconds.items()
        },
        "start_up_seconds": start_up,
        "pays_off_after_requests": round(start_up / saved),
    }


def load(repeats: int) -> dict[str, Any]:
    (diffusion, tokenizer), (ar, _) = bundled("bundled"), bundled("bundled-ar")
    prompts = [encode_prompt(tokenizer, p.messages()[:1]) for p in test_problems(1, 256)]
    workload = Workload({"diffusion": diffusion, "autoregressive": ar}, prompts, 600)
    config = BenchConfig(concurrency=(1, 4, 16, 32, 64, 128), sub_block_sizes=(8, 32), compile=(True,), repeats=repeats)
    return {"rows": summarise(measure(workload, config, progress=lambda *now: print(*now, flush=True)))}


class Steps:
    """Denoising (or AR) steps of one request behind a long prompt, one at a time."""

    def __init__(self, model: Any, context: int, mode: Any, width: int) -> None:
        self.engine = pb.Engine(model, pb.EngineConfig(max_rows=1, max_context=context + 4096, prefix_cache=False))
        prompt = np.random.default_rng(0).integers(0, 600, context + 1).tolist()
        config = pb.DecodeConfig(
            mode=mode, max_new_tokens=2048, stop_token_ids=(), strategy="fixed", sub_block_cache=width < 32,
            sub_block_size=width,
        )  # fmt: skip
        self.width = width
        self.ran = self.predictions = 0  # queries and predictions of the latest step
        self._forward = self.engine.runner._forward
        self.engine.runner._forward = self._noting
        self.engine.submit(pb.Request(prompt, config))
        while not self.engine.batch.rows.forwards_R[0]:
            self.engine.step()

    def _noting(self, ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        self.ran, self.predictions = ids.shape[1], len(wanted)
        return self._forward(ids, positions, wanted)

    def one(self) -> float:
        """Seconds of the next step that runs as many tokens as asked."""
        while True:
            started = time.perf_counter()
            self.engine.step()
            seconds = time.perf_counter() - started
            if self.ran == self.width:
                return seconds


def context(repeats: int) -> dict[str, Any]:
    """Step time against context, for 1 (AR), 8 (a sub-block) and 32 (a block) tokens, on the bundled model's shape."""
    shape = RESULTS / "shape.part"
    shape.write_text(json.dumps(BUNDLED_SHAPE))
    model = random_model(str(shape), block_size=32, dtype=torch.float32, device="cpu")
    shape.unlink()
    torch.set_num_threads(1)
    lengths = [0, 1024, 2048, 4096, 8192]
    report: dict[str, Any] = {"kinds": {}}
    for kind, (mode, width) in KINDS.items():
        runs = {length: Steps(model, length, mode, width) for length in lengths}
        seen = interleaved({str(n): run.one for n, run in runs.items()}, repeats)
        per_token = runs[0].engine.runner.kv.bytes_per_token
        for run in runs.values():
            run.engine.close()
        times = [1000 * statistics.median(seen[str(n)]) for n in lengths]
        slope, start = np.polyfit(lengths, times, 1)
        fitted = slope * np.array(lengths) + start
        scatter = 1 - ((np.array(times) - fitted) ** 2).sum() / ((np.array(times) - np.mean(times)) ** 2).sum()
        report["kinds"][kind] = {
            "lengths": lengths, "milliseconds": times,
            "spread": {n: spread([1000 * v for v in values]) for n, values in seen.items()},
            "slope_ns_per_token": 1e6 * slope, "r_squared": float(scatter),
        }  # fmt: skip
        print(kind, report["kinds"][kind], flush=True)
    bandwidth = copy_bandwidth()
    report |= {"kv_bytes_per_token": per_token, "bytes_per_second": bandwidth,
               "predicted_ns_per_token": 1e9 * per_token / bandwidth}  # fmt: skip
    # the same attention alone: queries of one block over K/V that lie ready
    report["attention_alone_ns_per_token"] = {
        str(width): attention_slope(width) for width in (1, 8, 32)
    }  # fmt: skip
    return report


def copy_bandwidth() -> float:
    """Bytes per second that one thread reads from memory (summing, 256 MB)."""
    data = torch.ones(2**26)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - started)
    return data.numel() * 4 / statistics.median(times)


def attention_slope(width: int) -> float:
    """Nanoseconds per K/V token of bare attention in all six layers: torch's own, on K/V that no cache holds."""
    times, other = {}, torch.ones(2**25)
    for length in (1024, 8192):
        q = torch.randn(1, 2, 2 * width, 32)
        k, v = (torch.randn(6, length, 2, 32).transpose(1, 2)[:, None] for _ in range(2))
        seen = []
        for _ in range(30):
            other.sum()  # 128 MB pass through the caches
            started = time.perf_counter()
            for layer in range(6):
                nn.functional.scaled_dot_product_attention(q, k[layer], v[layer])
            seen.append(time.perf_counter() - started)
        times[length] = statistics.median(seen)
    return 1e9 * (times[8192] - times[1024]) / (8192 - 1024)


def bare_forward(model: Any, tokens: int, predictions: int) -> Callable[[], None]:
    """The model's matrix products alone, at the sizes of a step."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    inputs: dict[int, Tensor] = {m.in_features: torch.randn(tokens, m.in_features).to(model.dtype) for m in layers}
    last = torch.randn(predictions, head.in_features).to(model.dtype)

    def run() -> None:
        with torch.inference_mode():
            for layer in layers:
                nn.functional.linear(inputs[layer.in_features], layer.weight, layer.bias)
            nn.functional.linear(last, head.weight)

    return run


def large(repeats: int) -> dict[str, Any]:
    """A step of the 0.5B shape against a bare forward of the same matrices, and against one AR step."""
    report = {}
    for dtype in (torch.bfloat16, torch.float32):
        torch.set_num_threads(os.cpu_count() or 1)
        name = str(dtype).removeprefix("torch.")
        report[name] = _large(random_model("0.5b", block_size=32, dtype=dtype, device="cpu"), repeats)
        print(name, json.dumps(report[name], indent=1), flush=True)
    return report


def _large(model: Any, repeats: int) -> dict[str, Any]:
    runs = {kind: Steps(model, 128, mode, width) for kind, (mode, width) in KINDS.items()}
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def step_and_bare(kind: str) -> float:
        run = runs[kind]
        seconds = run.one()
        bare = bare_forward(model, run.width, run.predictions)
        started = time.perf_counter()
        bare()
        ratios[kind].append(seconds / (time.perf_counter() - started))
        return seconds

    seen = interleaved({kind: partial(step_and_bare, kind) for kind in KINDS}, repeats)
    for run in runs.values():
        run.engine.close()
    return {
        kind: {
            "milliseconds": spread([1000 * v for v in seen[kind]]),
            "over_bare_forward": spread(ratios[kind][1:]),
            "over_ar_step": spread([a / b for a, b in zip(seen[kind], seen["AR, 1 token"], strict=True)]),
        }
        for kind in KINDS
    }


def documents() -> None:
    """The page, from the stored results."""
    from performance_page import page

    parts = {part: json.loads((RESULTS / f"engine-{part}.json").read_text()) for part in PARTS}
    plot_concurrency(PICTURES / "load.png", parts["load"]["rows"], "bundled models, 2 CPU cores, float32")
    plot_steps(PICTURES / "context.png", parts["context"]["kinds"], "the bundled model's shape, 1 thread, float32")
    DOCUMENT.write_text(page(parts, markdown))


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "batch-one": lambda args: batch_one(args.problems),
    "load": lambda args: load(args.repeats),
    "context": lambda args: context(20 * args.repeats),
    "large": lambda args: large(args.repeats),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[*PARTS, "documents"])
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for part in args.parts:
        if part == "documents":
            documents()
            continue
        if part not in PARTS:
            parser.error(f"{part} is no part; use {', '.join(PARTS)} or documents")
        command = f"python benchmarks/engine.py {part} --problems {args.problems} --repeats {args.repeats}"
        content = PARTS[part](args)
        write(f"engine-{part}", {"setting": setting(command), **content})


if __name__ == "__main__":
    main()
