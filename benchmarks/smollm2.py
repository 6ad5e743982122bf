"""SmolLM2-135M-Instruct, speculative: against autoregressive decoding, and against other programs.

    python benchmarks/smollm2.py                       # all parts, some 40 minutes on two cores
    python benchmarks/smollm2.py held-out              # some of them
    python benchmarks/smollm2.py others --gguf FILE    # llama.cpp, too, if llama-cpp-python is installed

- held-out: 100 prompts of ten kinds that the adapter never saw, float32: are the answers the autoregressive ones, and
  how many tokens does a forward make, by kind and by drafter, where every forward drafts;
- alone: one request at a time, in the fastest dtype, eager and compiled: how much faster than autoregressive decoding;
- in-flight: 1 to 32 requests in flight;
- others: the same prompts by transformers' `generate` (plain, and with prompt lookup) and by llama.cpp.

Each part writes `benchmarks/results/smollm2-<part>.json`. Prompts: `benchmarks/smollm2_prompts.jsonl`.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch

import parablock as pb
from parablock.bench.config import BenchConfig
from parablock.bench.throughput import Workload, measure, summarise
from parablock.data.chat import encode_prompt

NEAR = 1e-4  # two logits that lie so near are a tie: which of them is the greater is rounding
AR = pb.DecodeConfig(mode="autoregressive", max_new_tokens=128)
BOTH = replace(AR, mode="speculative")
DRAFTERS = {
    "masks and lookup": BOTH, "masks": replace(BOTH, drafter="masks"), "lookup": replace(BOTH, drafter="lookup"),
}  # fmt: skip
ALWAYS = 3  # drafts in every forward, where it is their number that is asked for
THREADS = 1


def prompts(tokenizer: Any, of_kind: int = 10) -> list[tuple[str, list[int]]]:
    """The first so many of every kind, with the kind."""
    lines = (Path(__file__).parent / "smollm2_prompts.jsonl").read_text().splitlines()
    by_kind: dict[str, list[list[int]]] = defaultdict(list)
    for row in map(json.loads, lines):
        by_kind[row["kind"]].append(encode_prompt(tokenizer, row["messages"]))
    return [(kind, ids) for kind, rows in sorted(by_kind.items()) for ids in rows[:of_kind]]


def held_out(args: argparse.Namespace) -> dict[str, Any]:
    """Every prompt by every drafter, against autoregressive decoding."""
    model, tokenizer = pb.load("smollm2", device="cpu", dtype="float32")
    asked = prompts(tokenizer)
    ids = [prompt for _, prompt in asked]
    decoders = {"AR": AR} | {name: replace(config, draft_tokens=ALWAYS) for name, config in DRAFTERS.items()}
    with pb.Engine(model, pb.EngineConfig(max_rows=4, max_context=1024, threads=2)) as engine:
        outs = {}
        for name, config in decoders.items():
            outs[name] = engine.generate(ids, config)
            print(name, f"{outs[name].seconds:.0f} s", flush=True)
    rows = [
        {
            "kind": kind, "tokens": len(outs["AR"].tokens[i]),
            "forwards": {name: out.decode_forwards[i] for name, out in outs.items()},
            "gap": {name: _gap(model, ids[i], outs["AR"].tokens[i], out.tokens[i]) for name, out in outs.items()},
        }
        for i, (kind, _) in enumerate(asked)
    ]  # fmt: skip
    return {"near": NEAR, "draft_tokens": ALWAYS, "rows": rows}


@torch.inference_mode()
def _gap(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> float | None:
    """None if two answers are the same; else how far the likeliest two logits are apart where they part."""
    if ours == theirs:
        return None
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    first, second = model(torch.tensor([prompt + ours[:same]])).logits[0, -1].topk(2).values.tolist()
    return first - second


def alone(args: argparse.Namespace) -> dict[str, Any]:
    """One request at a time: seconds and forwards of every answer, all decoders in turns."""
    model, tokenizer = pb.load("smollm2", device="cpu")
    asked = prompts(tokenizer, of_kind=2)
    report: dict[str, Any] = {"dtype": str(model.dtype)}
    for compiled in (False, True):
        name = "compiled" if compiled else "eager"
        with pb.Engine(
            model, pb.EngineConfig(max_rows=1, max_context=1024, threads=THREADS, compile=compiled)
        ) as engine:
            for config in (AR, *DRAFTERS.values()):  # and how long forwards take is known from here on
                engine.generate([asked[0][1], asked[4][1]], config)
            runs = defaultdict(list)
            for kind, prompt in asked:
                outs = {label: _timed(engine, prompt, config) for label, config in ({"AR": AR} | DRAFTERS).items()}
                for label, (seconds, out) in outs.items():
                    tokens = out.tokens[0]
                    runs[label].append({
                        "kind": kind, "seconds": seconds, "tokens": len(tokens), "forwards": out.decode_forwards[0],
                        "drafted": out.drafted[0], "accepted": out.accepted[0],
                        "equal": tokens == outs["AR"][1].tokens[0],
                    })  # fmt: skip
                ratios = {label: round(outs["AR"][0] / outs[label][0], 2) for label in outs}
                print(name, kind, ratios, flush=True)
        report[name] = runs
    return report


def _timed(engine: pb.Engine, prompt: list[int], config: pb.DecodeConfig) -> tuple[float, Any]:
    began = time.perf_counter()
    out = engine.generate(prompt, config)
    return time.perf_counter() - began, out


def in_flight(args: argparse.Namespace) -> dict[str, Any]:
    """`parablock bench` of these prompts."""
    model, tokenizer = pb.load("smollm2", device="cpu")
    asked = [prompt for _, prompt in prompts(tokenizer)]
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    config = BenchConfig(
        concurrency=(1, 2, 4, 8, 16, 32), new_tokens=48, requests=4, rounds=1, repeats=args.repeats, threads=THREADS
    )
    workload = Workload({"autoregressive": model, "speculative": model}, [asked[i] for i in order], len(tokenizer))
    results = measure(workload, config, progress=lambda done, total, case: print(done, total, case.name, flush=True))
    return {"dtype": str(model.dtype), "rows": summarise(results)}


def others(args: argparse.Namespace) -> dict[str, Any]:
    """Whole answers, prompt included, by every program in turns; llama.cpp's weights are made from the same file."""
    model, tokenizer = pb.load("smollm2", device="cpu", dtype="bfloat16")
    asked = prompts(tokenizer, of_kind=1)[::2]
    runs: dict[str, Callable[[list[int]], int]] = {}
    for dtype in ("bfloat16", "int8"):
        ours = model if dtype == "bfloat16" else pb.load("smollm2", device="cpu", dtype=dtype)[0]
        for how, compiled in (("", False), (", compiled", True)):
            engine = pb.Engine(ours, pb.EngineConfig(max_rows=1, max_context=1024, threads=THREADS, compile=compiled))
            for name, config in (("AR", AR), ("speculative", BOTH)):
                runs[f"parablock {dtype}{how}, {name}"] = _parablock(engine, config)
    plain, _ = pb.load("smollm2-ar", device="cpu", dtype="bfloat16", packed=False)
    torch.set_num_threads(THREADS)
    runs["transformers bfloat16"] = _transformers(plain)
    runs["transformers bfloat16, prompt lookup"] = _transformers(plain, prompt_lookup_num_tokens=5)
    llama, version = _llama_cpp(args.gguf)
    runs |= llama
    rates = defaultdict(list)
    for number, (kind, prompt) in enumerate([asked[0], asked[-1], *asked]):
        for name, run in runs.items():
            began = time.perf_counter()
            tokens = run(prompt)
            if number > 1:  # the first two warm up
                rates[name].append(tokens / (time.perf_counter() - began))
        print(kind, {name: round(found[-1], 1) for name, found in rates.items()}, flush=True)
    return {"threads": THREADS, "llama_cpp": version, "tokens_per_second": rates}


def _parablock(engine: pb.Engine, config: pb.DecodeConfig) -> Callable[[list[int]], int]:
    return lambda prompt: len(engine.generate(prompt, config).tokens[0])


def _transformers(model: Any, **options: Any) -> Callable[[list[int]], int]:
    def run(prompt: list[int]) -> int:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=AR.max_new_tokens, **options
        )
        return int(out.shape[1]) - len(prompt)

    return run


def _llama_cpp(gguf: Path | None) -> tuple[dict[str, Callable[[list[int]], int]], str | None]:
    """The file as it is, and made again in bfloat16 and 8 bits; the version of llama-cpp-python."""
    if gguf is None:
        return {}, None
    import llama_cpp

    def runner(file: Path) -> Callable[[list[int]], int]:
        llama = llama_cpp.Llama(str(file), n_ctx=1024, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

        def run(prompt: list[int]) -> int:
            llama.reset()
            count = 0
            for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
                count += 1
                if token == llama.token_eos() or count == AR.max_new_tokens:
                    break
            return count

        return run

    made = {f"llama.cpp {gguf.name.split('.')[-2]}": gguf}
    for name in ("BF16", "Q8_0"):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"), True
        made[f"llama.cpp {name}"] = Path(gguf.parent / f"{name}.gguf")
        llama_cpp.llama_model_quantize(str(gguf).encode(), str(made[f"llama.cpp {name}"]).encode(), params)
    return {name: runner(file) for name, file in made.items()}, llama_cpp.__version__


def main() -> None:
    parts = {part.__name__.replace("_", "-"): part for part in (held_out, alone, in_flight, others)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--gguf", type=Path, help="for others: the file that llama.cpp reads; it needs a folder to write to"
    )
    args = parser.parse_args()
    for part in args.parts or parts:
        print(f"{part}:", flush=True)
        found = parts[part](args)
        command = f"python benchmarks/smollm2.py {part}"
        common.write(
            f"smollm2-{part}", {"setting": {"command": command, "commit": common.commit(), **common.machine()}, **found}
        )


if __name__ == "__main__":
    main()
