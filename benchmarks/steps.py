"""What a step costs at real sizes on a CPU, and where its time goes: measures what `page.py performance` shows.

    python benchmarks/steps.py              # all parts, about half an hour on two cores
    python benchmarks/steps.py kinds        # some of them

- kinds: milliseconds of a step of 1 (AR), 8, 16 and 32 tokens, one request, one thread, by dtype and by how the weights
  lie: plain (as a stock model has them), packed, in 8 bits; packed and compiled;
- shares: where a step's time goes, for 1 and 32 requests: products, attention, the rest of the model, the host;
- answers: bfloat16 and 8 bits against float32 on the bundled task: equal answers, accuracy;
- memory: of a process that loads a checkpoint, opens an engine, answers;
- threads: a step on two threads that wait actively or passively, on an idle machine.

Each part writes `benchmarks/results/steps-<part>.json`. Random weights where a size is a shape alone.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from engine import Steps
from torch import nn

import parablock as pb
from parablock.bench.shapes import random_model
from parablock.evals.word_problems import is_correct, test_problems
from parablock.packed import Int8Linear

SIZES = ("bundled", "135m", "0.5b")
WIDTHS = (1, 8, 16, 32)
CONTEXT = 45  # tokens of the prompt
WEIGHTS = {
    "float32, plain": ("float32", "plain"),
    "float32, packed": ("float32", "packed"),
    "bfloat16, plain": ("bfloat16", "plain"),
    "bfloat16, packed": ("bfloat16", "packed"),
    "8 bits": ("bfloat16", "int8"),
}


def make(size: str, dtype: str, how: str) -> Any:
    """A model of that size; its linear layers plain, packed, or in 8 bits."""
    if size == "bundled":
        model, _ = pb.load(device="cpu", dtype=dtype, packed=False)
        model.config.max_position_embeddings = 8192
    else:
        model = random_model(size, block_size=32, dtype=getattr(torch, dtype), device="cpu")
    if how != "plain":
        pb.pack(model, int8=how == "int8")
    return model


def kinds(problems: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    report: dict[str, Any] = {"bytes_per_second": copy_bandwidth()}
    for size in SIZES:
        report[size] = {width: {} for width in WIDTHS}
        models = {name: make(size, *made) for name, made in WEIGHTS.items()}
        report[f"{size} weights"] = {name: weight_bytes(model) for name, model in models.items()}
        for width in WIDTHS:
            mode: Any = "autoregressive" if width == 1 else "diffusion"
            runs = {name: Steps(model, CONTEXT, mode, width) for name, model in models.items()}
            seen = common.in_turns({name: run.one for name, run in runs.items()}, 4 * repeats)
            for run in runs.values():
                run.engine.close()
            for name, took in seen.items():
                report[size][width][name] = {
                    "milliseconds": common.spread([1000 * value for value in took]),
                    "over": {other: common.ratios(seen[other], took) for other in seen if other.endswith("plain")},
                }
            print(size, width, {name: round(1000 * statistics.median(took), 2) for name, took in seen.items()})
    return report


def weight_bytes(model: Any) -> int:
    """What one token's products read: the weights of the linear layers, the head among them."""
    return sum(
        layer.in_features * layer.out_features * (1 if isinstance(layer, Int8Linear) else layer.weight.element_size())
        for layer in model.modules()
        if isinstance(layer, (nn.Linear, Int8Linear))
    )


def copy_bandwidth() -> float:
    """Bytes per second that one thread copies, in pieces that no cache holds."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return source.nbytes / min(common.seconds(lambda: target.copy_(source)) for _ in range(9))


class Clock:
    """Seconds spent in functions, by the name of their share."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def around(self, share: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            out = function(*args, **kwargs)
            self.spent[share] += time.perf_counter() - started
            return out

        return timed


def shares(problems: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    for size in SIZES:
        dtype = "float32" if size == "bundled" else "bfloat16"
        for how in ("plain", "packed"):
            model = make(size, dtype, how)
            for mode, requests in (("autoregressive", 1), ("diffusion", 1), ("autoregressive", 32), ("diffusion", 32)):
                row = _shares(model, mode, requests, 8 * repeats)
                report.setdefault(size, {}).setdefault(how, {})[f"{mode}, {requests}"] = row
                print(size, how, mode, requests, row, flush=True)
    return report


def _shares(model: Any, mode: Any, requests: int, steps: int) -> dict[str, float]:
    clock = Clock()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    with pb.Engine(model, pb.EngineConfig(max_rows=requests, prefix_cache=False, max_context=512)) as engine:
        generator = torch.Generator().manual_seed(0)
        config = pb.DecodeConfig(mode=mode, max_new_tokens=448, stop_token_ids=(), strategy="fixed", sub_block_size=8)
        for _ in range(requests):
            prompt = torch.randint(0, 600, (CONTEXT,), generator=generator).tolist()
            engine.submit(pb.Request(prompt, config))
        for _ in range(8):  # the prompts are read
            engine.step()
        engine.runner.attend = clock.around("attention", engine.runner.attend)  # type: ignore[method-assign]
        engine.runner._compute = clock.around("model", engine.runner._compute)  # type: ignore[method-assign]
        for layer in layers:
            layer.forward = clock.around("products", layer.forward)
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        total = time.perf_counter() - started
    for layer in layers:
        del layer.forward
    spent = clock.spent
    return {
        "milliseconds": 1000 * total / steps,
        "products": spent["products"] / total,
        "attention": spent["attention"] / total,
        "rest of the model": (spent["model"] - spent["products"] - spent["attention"]) / total,
        "host": 1 - spent["model"] / total,
    }


def answers(problems: int, repeats: int) -> dict[str, Any]:
    """The bundled models on their task: share of answers equal to float32's, and accuracy, by how they are run."""
    found = test_problems(5, 2 * problems)
    report: dict[str, Any] = {"problems": len(found)}
    cases = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "bfloat16, compiled": {"dtype": "bfloat16"},
             "8 bits": {"dtype": "int8"}}  # fmt: skip
    for name in ("bundled-ar", "bundled"):
        told: dict[str, list[list[int]]] = {}
        for case, options in cases.items():
            model, tokenizer = pb.load(name, device="cpu", **({"dtype": "float32"} | options))
            with pb.Engine(model, pb.EngineConfig(compile="compiled" in case)) as engine:
                out = engine.generate(common.questions(tokenizer, found), pb.DecodeConfig(max_new_tokens=160))
            told[case] = out.tokens
        report[name] = {
            case: {
                "equal": statistics.mean(a == b for a, b in zip(tokens, told["float32"], strict=True)),
                "accuracy": statistics.mean(is_correct(tokenizer, a, p) for a, p in zip(tokens, found, strict=True)),
            }
            for case, tokens in told.items()
        }
        print(name, report[name], flush=True)
    return report


LOADING = """
import json, sys
import torch, transformers, parablock as pb
from transformers import AutoModelForCausalLM
from parablock.checkpoints.load import load
from parablock.engine.engine import Engine
def memory(name="RssAnon"):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1000
open("/proc/self/clear_refs", "w").write("5")
seen = {"before": memory()}
model, _ = load(sys.argv[1], device="cpu", dtype=sys.argv[2], packed=sys.argv[3] == "True")
seen |= {"most during the load": memory("VmHWM"), "after": memory(), "of the file": memory("RssFile")}
engine = Engine(model, pb.EngineConfig(max_rows=4, max_context=1024))
engine.generate([list(range(45))] * 4, pb.DecodeConfig(mode="autoregressive", max_new_tokens=16, stop_token_ids=()))
seen["engine open"] = memory()
print(json.dumps(seen))
"""


def memory(problems: int, repeats: int) -> dict[str, Any]:
    """Megabytes of a process: before a load, at most during it, after it, and with an engine that has answered.

    At most: with the pages of the checkpoint's file that are in memory; else its own memory alone. The file's pages are
    the system's to drop.
    """
    report: dict[str, Any] = {}
    _, tokenizer = pb.load(device="cpu")
    for size in SIZES[1:]:
        with tempfile.TemporaryDirectory() as folder:
            pb.save(make(size, "bfloat16", "plain"), tokenizer, f"{folder}/model")
            report[size] = {"on disk": sum(file.stat().st_size for file in Path(folder, "model").iterdir()) / 1e6}
            for name, (dtype, how) in WEIGHTS.items():
                dtype = "int8" if how == "int8" else dtype
                command = [sys.executable, "-c", LOADING, f"{folder}/model", dtype, str(how != "plain")]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                report[size][name] = json.loads(out.splitlines()[-1])
                print(size, name, report[size][name], flush=True)
    return report


WAITING = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import steps, common, statistics
model = steps.make("135m", "bfloat16", "packed")
torch.set_num_threads(int(sys.argv[2]))
out = {}
for mode, width in (("autoregressive", 1), ("diffusion", 32)):
    run = steps.Steps(model, steps.CONTEXT, mode, width)
    out[width] = statistics.median(1000 * run.one() for _ in range(24))
    run.engine.close()
print(json.dumps(out))
"""


def threads(problems: int, repeats: int) -> dict[str, Any]:
    """A step at 135M by threads and by how waiting threads wait, alone and beside another busy process."""
    report: dict[str, Any] = {}
    for busy in (False, True):
        for name, count, env in (
            ("1 thread", 1, {"OMP_WAIT_POLICY": "passive"}),
            ("2 threads, passive", 2, {"OMP_WAIT_POLICY": "passive"}),
            ("2 threads, a short spin", 2, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000"}),
            ("2 threads, active", 2, {"OMP_WAIT_POLICY": "active"}),
        ):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                command = [sys.executable, "-c", WAITING, str(Path(__file__).parent), str(count)]
                clean = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
                seen = []
                for _ in range(3):
                    out = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | env).stdout
                    seen.append(json.loads(out.splitlines()[-1]))
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
            place = report.setdefault("beside a busy process" if busy else "alone", {})
            place[name] = {width: [one[width] for one in seen] for width in seen[0]}
            print(busy, name, place[name], flush=True)
    return report


if __name__ == "__main__":
    common.measure_parts(__doc__, kinds, shares, answers, memory, threads, problems=100, repeats=5)
