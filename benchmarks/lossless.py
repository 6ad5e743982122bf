"""Speculative decoding against autoregressive decoding, token for token, over thousands of random cases.

    python benchmarks/lossless.py --cases 10000

A case is a request: a model (small random ones of six architectures with random adapters, and the bundled one), a
prompt (some begin alike), a length, a drafter, how much it drafts, sampling; it arrives while others run, shares pages
with them, gives its own back when memory is short, is cancelled now and then; in engines of many sizes, one of them
compiled. Its tokens must be those of autoregressive decoding alone, and these, greedy, those of transformers'
`generate`. Writes `benchmarks/results/lossless.json`; exit status 1 if a difference is no near-tie.
"""

import itertools
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import common
import numpy as np
import torch
from schedules import run_arriving
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import parablock as pb
from parablock.diffusion.gate import attach, new_gate

NEAR = 1e-4  # two logits as close as this may change places
SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 256, "initializer_range": 0.35, "bos_token_id": None,
    "eos_token_id": 62, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZE), "qwen3": Qwen3Config(**SIZE, head_dim=8), "llama": LlamaConfig(**SIZE),
    "mistral, window 13": MistralConfig(**SIZE, sliding_window=13), "phi3": Phi3Config(**SIZE),
    "gemma2, window 13, softcap": Gemma2Config(**SIZE, head_dim=8, sliding_window=13, query_pre_attn_scalar=8),
}  # fmt: skip
LONGEST = 40  # tokens of an answer
SAMPLED = ({}, {}, {"temperature": 0.5}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 1.5, "top_k": 6})


def random_model(name: str, seed: int) -> Any:
    """A random AR model with a random adapter, some of whose drafts are right."""
    torch.manual_seed(seed)
    eager = {"attn_implementation": "eager"} if name.startswith("gemma") else {}
    model = AutoModelForCausalLM.from_config(CONFIGS[name], **eager).eval()
    gate = new_gate(model, draft_tokens=1 + seed % 5, rank=4, alpha=8, seed=seed)
    for parameter in gate.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    attach(model, gate)
    return model.eval()


class Judge:
    """What autoregressive decoding alone says, and whether another answer differs by more than near-ties."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.known: dict[Any, list[int]] = {}
        self.checked = 0  # greedy answers, against transformers' generate

    def answer(self, prompt: tuple[int, ...], config: pb.DecodeConfig) -> list[int]:
        """Of a request that runs alone; a short answer is the beginning of a long one."""
        long = replace(config, max_new_tokens=LONGEST)
        key = prompt, replace(long, seed=0) if config.temperature == 0 else long
        if key not in self.known:
            self.known[key] = pb.generate(self.model, list(prompt), long).tokens[0]
            if config.temperature == 0:
                self._check(prompt, long, self.known[key])
        return self.known[key][: config.max_new_tokens]

    def _check(self, prompt: tuple[int, ...], config: pb.DecodeConfig, tokens: list[int]) -> None:
        stops = list(config.stop_token_ids or ()) or None
        out = self.model.generate(
            torch.tensor([prompt]), max_new_tokens=config.max_new_tokens, do_sample=False, eos_token_id=stops,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )  # fmt: skip
        theirs = out[0, len(prompt) :].tolist()
        assert self.alike(prompt, theirs, tokens), ("transformers", prompt, theirs, tokens)
        self.checked += 1

    def alike(self, prompt: tuple[int, ...], got: list[int], wanted: list[int]) -> bool:
        """Equal up to the first near-tie (greedy)."""
        if got == wanted:
            return True
        at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
        if at is None:
            return False
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*prompt, *wanted[:at]]]), use_cache=False).logits[0, -1]
        return bool((logits[got[at]] - logits[wanted[at]]).abs() < NEAR)


def draw(rng: np.random.Generator, prompts: list[list[int]]) -> tuple[Any, ...]:
    """One request: prompt, settings, whether streamed, steps until the next, steps until it is cancelled."""
    decode = pb.DecodeConfig(
        mode="speculative", drafter=rng.choice(["masks", "both", "lookup"]),
        draft_tokens=rng.choice([None, 1, 2, 3, 7]), draft_threshold=float(rng.choice([0.0, 0.0, 0.3])),
        max_new_tokens=int(rng.integers(1, LONGEST + 1)), seed=int(rng.integers(2)),
        stop_token_ids=(7, 21) if rng.random() < 0.7 else (), **SAMPLED[rng.integers(len(SAMPLED))],
    )  # fmt: skip
    patience = int(rng.integers(0, 12)) if rng.random() < 0.15 else None
    return (
        tuple(prompts[rng.integers(len(prompts))]),
        decode,
        bool(rng.random() < 0.3),
        int(rng.integers(0, 6)),
        patience,
    )


def schedule(engine: pb.Engine, judge: Judge, requests: list[tuple[Any, ...]], counts: Counter[str]) -> list[Any]:
    """Run requests as they arrive; returns the differences."""
    arrivals = [(pb.Request(list(prompt), decode, stream=stream), pause, patience)
                for prompt, decode, stream, pause, patience in requests]  # fmt: skip
    differences = []
    for handle, (prompt, decode, *_) in zip(run_arriving(engine, arrivals), requests, strict=True):
        plain = replace(decode, mode="autoregressive", drafter=None, draft_tokens=None, draft_threshold=0.0)
        wanted = judge.answer(prompt, plain)
        got = handle.tokens if handle.status == "cancelled" else handle.result()
        counts["cases"] += 1
        counts["cancelled"] += handle.status == "cancelled"
        counts["sampled"] += decode.temperature > 0
        counts["drafted"] += sum(handle.drafted.values())
        counts["accepted"] += sum(handle.accepted.values())
        counts["prompt tokens reused"] += handle.cached_tokens
        if got != (wanted[: len(got)] if handle.status == "cancelled" else wanted):
            near = decode.temperature == 0 and judge.alike(prompt, got, wanted)
            counts["near-ties"] += near
            if not near:
                differences.append((prompt, decode, got, wanted))
    counts["preemptions"] += engine.stats["preemptions"]
    return differences


def main() -> None:
    args = common.options(__doc__, cases=10_000, seed=0)
    rng, began = np.random.default_rng(args.seed), time.perf_counter()
    counts, differences = Counter[str](), list[Any]()
    models = {name: random_model(name, seed) for seed, name in enumerate(CONFIGS)}
    models["bundled-causal"] = pb.load("bundled-causal", device="cpu")[0]
    judges = {name: Judge(model) for name, model in models.items()}
    beginning = rng.integers(0, 60, 24).tolist()
    prompts = [beginning[: int(n)] + rng.integers(0, 60, int(m)).tolist() for n, m in zip(
        rng.choice([0, 8, 16, 24], 16), rng.integers(1, 32, 16), strict=True)]  # fmt: skip
    for name, model in itertools.cycle(models.items()):
        if counts["cases"] >= args.cases:
            break
        rows = int(rng.choice([1, 2, 4, 8, 16]))
        config = pb.EngineConfig(
            block_size=int(rng.choice([8, 16, 32])), max_rows=rows, kv_tokens=int(rng.choice([104, 200, 2000])),
            max_context=96, prefill_chunk=16, prefix_cache=bool(rng.random() < 0.8),
            compile=name == "bundled-causal" and not counts["compiled"],
        )  # fmt: skip
        requests = [draw(rng, prompts) for _ in range(int(rng.integers(8, 40)))]
        with pb.Engine(model, config) as engine:
            before = counts["cases"]
            differences += schedule(engine, judges[name], requests, counts)
            counts[name] += counts["cases"] - before
            counts["compiled"] += (counts["cases"] - before) * config.compile
        if counts["cases"] // 500 > before // 500:
            print(
                f"{counts['cases']} cases, {len(differences)} differences, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    counts["greedy answers also compared with transformers"] = sum(judge.checked for judge in judges.values())
    report = {"setting": common.setting(args), "seconds": time.perf_counter() - began, "differences": len(differences)}
    common.write("lossless", {**report, **{name: int(count) for name, count in counts.items()}})
    for difference in differences[:5]:
        print(*difference, sep="\n  ")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
