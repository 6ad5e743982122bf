"""What the GPU of this machine computes, and how fast. Run it, and paste the table that it prints into your report.

    python benchmarks/gpu_check.py

First whether it is right: the tokens of every mode and strategy, by `pb.generate` and by the engine in all its ways,
against those of the CPU in float32 (without TF32); the training loss and its gradients by every attention. Then how
fast: steps of the engine in bfloat16 over the time it takes to read the weights, and training over the rate of a large
matrix product. A check that fails is a line of the table, and the others go on; the exit status is then 1. Everything
is also written to `benchmarks/results/gpu_check.json`.
"""

import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import common
import torch

import parablock as pb
from parablock.bench.shapes import random_model
from parablock.diffusion.noise import sample_noise
from parablock.evals.word_problems import test_problems
from parablock.training.config import TrainConfig
from parablock.training.cost import Shape, estimate

Found = dict[str, Any]  # what a check found: "told" in words, and its numbers
Checks = Iterator[tuple[str, Callable[[], Found]]]

SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
CONFIGS = {
    name: pb.DecodeConfig(max_new_tokens=96, **settings)
    for name, settings in {
        "AR": {"mode": "autoregressive"},
        "AR, sampled": {"mode": "autoregressive", **SAMPLED},
        "threshold": {},
        "threshold, whole blocks": {"sub_block_cache": False, "sub_block_size": 32},
        "factor": {"strategy": "factor"},
        "fixed": {"strategy": "fixed", "tokens_per_step": 2},
        "verified": {"strategy": "verified"},
        "threshold, sampled": SAMPLED,
    }.items()
}
ENGINES: dict[str, dict[str, bool]] = {
    "engine": {},
    "engine, compile": {"compile": True},
    "engine, cuda_graphs": {"cuda_graphs": True},
    "engine, compile and cuda_graphs": {"compile": True, "cuda_graphs": True},
}
KINDS = {1: "AR, 1 token", 8: "a sub-block, 8 tokens", 32: "a block, 32 tokens"}


def right_tokens(device: str, problems: int) -> Checks:
    """Whether every way to decode gives the tokens of the CPU."""

    @cache
    def loaded() -> tuple[Any, list[list[int]], dict[str, list[list[int]]]]:
        (host, tokenizer), (model, _) = (pb.load("bundled", device=at, dtype="float32") for at in ("cpu", device))
        prompts = common.questions(tokenizer, test_problems(5, problems))
        return model, prompts, {name: pb.generate(host, prompts, config).tokens for name, config in CONFIGS.items()}

    def compared(make: Callable[..., pb.GenerateOutput], names: Iterable[str] = CONFIGS) -> Found:
        _, prompts, expected = loaded()
        found = {name: make(prompts, CONFIGS[name]).tokens for name in names}
        pairs = [pair for name in found for pair in zip(found[name], expected[name], strict=True)]
        same = sum(got == wanted for got, wanted in pairs)
        if same < len(pairs):
            wrong = [name for name in found if found[name] != expected[name]]
            raise ValueError(f"only {same} of {len(pairs)} answers are the CPU's; others with {'; '.join(wrong)}")
        return {"told": f"all {same} answers are the CPU's, token for token", "answers": same}

    def engine(settings: dict[str, bool]) -> Found:
        with pb.Engine(loaded()[0], pb.EngineConfig(max_rows=8, **settings)) as engine:
            return compared(engine.generate)

    for name in CONFIGS:
        yield f"tokens: generate, {name}", lambda name=name: compared(partial(pb.generate, loaded()[0]), [name])
    for name, settings in ENGINES.items():
        yield f"tokens: {name}", partial(engine, settings)
    yield "attention over pages, bfloat16", lambda: over_pages(device, loaded()[1])


def over_pages(device: str, prompts: list[list[int]]) -> Found:
    """Whether attention reads the pages where they lie; if so, how many answers are those of gathered pages."""
    model, _ = pb.load("bundled", device=device, dtype="bfloat16")
    reasons: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: reasons.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("parablock.engine.paged")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with pb.Engine(model, pb.EngineConfig(max_rows=8)) as engine:
            taken = engine.runner._paged
            answers = engine.generate(prompts).tokens
            engine.runner._paged = False
            gathered = engine.generate(prompts).tokens
    finally:
        log.removeHandler(handler)
    if not taken:
        return {"told": f"not used; {(reasons or ['this is no CUDA device'])[0]}", "used": False}
    same = sum(a == b for a, b in zip(answers, gathered, strict=True))
    return {"told": f"used; {same} of {len(prompts)} answers are those of gathered pages", "used": True, "same": same}


def right_gradients(device: str) -> Checks:
    """The loss and its gradients on the device against the reference on the CPU."""
    rows, length = 2, 256

    def step(at: str, attention: Any, half: bool = False) -> list[torch.Tensor]:
        model, _ = pb.load("bundled", device=at, dtype="float32")
        batch = [x.to(at) for x in rows_to_learn(model, rows, length, seed=0)]
        size = {"block_size": model.config.bd_size, "mask_token_id": model.config.mask_token_id}
        with torch.autocast(torch.device(at).type, torch.bfloat16, enabled=half):
            loss = pb.diffusion_loss(model.train(), *batch, attention=attention, **size)
        loss.backward()
        return [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]

    reference = step("cpu", "dense")

    def compared(attention: str, half: bool) -> Found:
        apart = [
            float((a - b).norm() / b.norm()) for a, b in zip(step(device, attention, half), reference, strict=True)
        ]
        told = f"loss {apart[0]:.1e} and gradients {max(apart[1:]):.1e} from the CPU's dense reference (relative)"
        limits = (3e-2, 0.3) if half else (1e-5, 1e-3)
        if not (apart[0] < limits[0] and max(apart[1:]) < limits[1]):  # not a number is not below either
            raise ValueError(told)
        return {"told": told, "loss": apart[0], "gradients": max(apart[1:])}

    for attention in ("block", "dense", "flex"):
        yield f"training: {attention}, float32", partial(compared, attention, False)
    yield "training: flex, bfloat16", partial(compared, "flex", True)


def rows_to_learn(model: Any, rows: int, length: int, seed: int) -> list[torch.Tensor]:
    """Ids, labels (the second half of every row) and noise."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.mask_token_id, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.arange(length) < length // 2, -100)
    size = model.config.bd_size
    return [ids, labels, torch.stack([sample_noise(length, size, seed=seed, epoch=0, sample=r) for r in range(rows)])]


def seconds(device: str, run: Callable[[], Any], repeats: int, warm_up: int = 3) -> list[float]:
    """Of each run, after some that don't count; each waits for the device."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    return [common.seconds(lambda: (run(), wait())) for _ in range(warm_up + repeats)][warm_up:]


class Speed:
    """How fast, beside what the machine was measured to do: bytes and operations per second."""

    def __init__(self, device: str, repeats: int, copied: int, matrix: int) -> None:
        self.device, self.repeats, self.copied, self.matrix = device, repeats, copied, matrix
        self.bandwidth = self.peak = float("nan")

    def checks(self, shapes: Sequence[str], trained: str, rows: int, length: int) -> Checks:
        yield "copy", self.copy
        yield "matrix product", self.product
        for shape in shapes:
            for name, settings in ENGINES.items():
                yield f"{shape}, {name}", partial(self.steps, shape, settings)
        yield f"{trained}, training", partial(self.training, trained, rows, length)

    def copy(self) -> Found:
        source = torch.ones(self.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        took = statistics.median(seconds(self.device, lambda: target.copy_(source), self.repeats))
        self.bandwidth = 2 * self.copied / took  # read and written
        return {"told": f"{self.bandwidth / 1e9:.0f} GB/s", "bytes_per_second": self.bandwidth}

    def product(self) -> Found:
        n = self.matrix
        a, b = (torch.randn(n, n, device=self.device).bfloat16() for _ in range(2))
        took = statistics.median(seconds(self.device, lambda: a @ b, self.repeats))
        self.peak = 2 * n**3 / took
        return {"told": f"{self.peak / 1e12:.1f} TFLOP/s in bfloat16", "flops": self.peak}

    def steps(self, shape: str, settings: dict[str, bool]) -> Found:
        """Engine steps of one request behind 128 tokens, against reading every weight once."""
        model = random_model(shape, block_size=32, dtype=torch.bfloat16, device=self.device)
        read = sum(p.nbytes for p in model.parameters())
        if not model.config.tie_word_embeddings:
            read -= model.get_input_embeddings().weight.nbytes
        floor = read / self.bandwidth
        config = pb.EngineConfig(max_rows=1, max_context=1024, prefix_cache=False, **settings)
        with pb.Engine(model, config) as engine:
            took = {width: statistics.median(self._steps(engine, width)) for width in KINDS}
        told = ", ".join(f"{KINDS[w]} {1000 * s:.2f} ms ({s / floor:.1f}x)" for w, s in took.items())
        return {"told": f"{told}; floor {1000 * floor:.2f} ms", "floor": floor, "steps": took}

    def _steps(self, engine: pb.Engine, width: int) -> list[float]:
        config = pb.DecodeConfig(
            mode="autoregressive" if width == 1 else "diffusion", max_new_tokens=512, stop_token_ids=(),
            strategy="fixed", sub_block_size=max(8, width), sub_block_cache=width < 32,
        )  # fmt: skip
        handle = engine.submit(pb.Request([*range(128)], config))
        took: list[float] = []
        while len(took) < 2 * self.repeats:  # the first half warms up: compiles, captures
            before = engine.runner.queries
            one = common.seconds(engine.step)
            if engine.runner.queries - before == width:
                took.append(one)
        handle.cancel()
        engine.step()
        return took[self.repeats :]

    def training(self, shape: str, rows: int, length: int) -> Found:
        """Steps of AdamW in mixed precision; every step has other noise, so another number of units."""
        model = random_model(shape, block_size=32, dtype=torch.float32, device=self.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        batches = iter(range(1_000_000))
        size = {"block_size": 32, "mask_token_id": model.config.mask_token_id}

        def step() -> None:
            batch = [x.to(self.device) for x in rows_to_learn(model, rows, length, seed=next(batches))]
            with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                loss = pb.diffusion_loss(model, *batch, **size)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        took = seconds(self.device, step, max(4, self.repeats // 2), warm_up=5)
        own, parameters = model.config, sum(p.numel() for p in model.parameters())
        one = TrainConfig(steps=1, batch_size=rows, micro_batch_size=rows, context_length=length)
        dimensions = Shape(parameters, own.num_hidden_layers, own.hidden_size, own.vocab_size)
        flops = estimate(dimensions, one, learned_share=0.5).flops
        rate, share = rows * length / statistics.median(took), flops / statistics.median(took) / self.peak
        told = f"{rate:,.0f} tokens/s, {100 * share:.0f} % of the matrix product's rate; slowest step {max(took):.2f} s"
        return {"told": told, "tokens_per_second": rate, "share_of_peak": share, "seconds": took}


def checked(checks: Checks) -> dict[str, Found]:
    """Every check's findings; of one that fails, what it says."""
    found: dict[str, Found] = {}
    for name, check in checks:
        started = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            found[name] = {"ok": True, **check()}
        except Exception as error:
            found[name] = {"ok": False, "told": f"FAILED: {type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        found[name]["took"] = time.perf_counter() - started
    return found


def table(found: dict[str, Found]) -> str:
    cells = [
        ("check", "found"),
        ("---", "---"),
        *((name, row["told"].replace("|", "/")) for name, row in found.items()),
    ]
    return "\n".join(f"| {name} | {told} |" for name, told in cells)


def all_checks(speed: Speed, problems: int, shapes: Sequence[str], trained: str, rows: int, length: int) -> Checks:
    """The order matters: first whether it is right, and the machine's rates before what is divided by them."""
    yield from right_tokens(speed.device, problems)
    yield from right_gradients(speed.device)
    yield from speed.checks(shapes, trained, rows, length)


def main() -> int:
    args = common.options(__doc__, problems=8, repeats=20)
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(f"gpu_check needs a GPU, and torch {torch.__version__} ({built}) sees none", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")  # no TF32
    speed = Speed("cuda", args.repeats, copied=2**30, matrix=8192)
    found = checked(all_checks(speed, args.problems, ("0.5b", "1.5b"), "0.5b", rows=4, length=1024))
    device = torch.cuda.get_device_properties(0)
    setting = common.setting(args) | {"cuda": torch.version.cuda, "memory_bytes": device.total_memory}
    print("\n".join(f"{name}: {value}" for name, value in setting.items()), "", table(found), sep="\n")
    common.write("gpu_check", {"setting": setting, "checks": found})
    return 0 if all(row["ok"] for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
