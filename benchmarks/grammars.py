"""Grammars: do whole answers fit 200 JSON schemas, in every mode, and what does a token cost that is held to one?

    python benchmarks/grammars.py

Temperature 1; the bundled models and a tiny random one with their tokenizer answer every schema once in every mode, in
an engine of 16 rows. Whole answers are validated with `jsonschema`, cut ones must be prefixes that the grammar accepts.
Latency: the same questions with and without a grammar that allows what is answered anyway, in turns, by the clock and
by the processor's time (which other programs disturb less); one request at a time and 16 at once. Writes
`benchmarks/results/grammars.json`.
"""

import json
import time
from dataclasses import replace
from functools import partial
from typing import Any

import common
import torch
from jsonschema import Draft202012Validator
from schemas import schema
from transformers import Qwen2Config, Qwen2ForCausalLM

import parablock as pb
from parablock.checkpoints.load import load
from parablock.evals.word_problems import test_problems

MODES: dict[str, dict[str, Any]] = {
    "block diffusion, threshold": {}, "block diffusion, factor": {"strategy": "factor"},
    "block diffusion, fixed": {"strategy": "fixed", "tokens_per_step": 2},
    "block diffusion, verified": {"strategy": "verified"}, "autoregressive": {"mode": "autoregressive"},
    "speculative": {"mode": "speculative"}, "speculative, 4 drafts": {"mode": "speculative", "draft_tokens": 4},
}  # fmt: skip
BASE = pb.DecodeConfig(temperature=1.0, seed=1)


def random_model(diffusion: bool) -> Any:
    """Tiny, with the bundled models' tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=640, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=512, initializer_range=0.35, eos_token_id=2,
    )  # fmt: skip
    config.bd_size, config.mask_token_id = (8 if diffusion else None), 3
    return Qwen2ForCausalLM._from_config(config).eval()


def fits(grammar: pb.CompiledGrammar, tokens: list[int], tokenizer: Any) -> bool:
    """Whether the answer is whole; then it is valid, else the beginning of what is."""
    whole = tokens[-1:] == [tokenizer.eos_token_id]
    matcher = grammar.matcher.deep_copy()
    text = tokens[:-1] if whole else tokens
    assert matcher.try_consume_tokens(text) == len(text)
    if whole:
        form = Draft202012Validator(
            json.loads(grammar.grammar.source), format_checker=Draft202012Validator.FORMAT_CHECKER
        )
        form.validate(json.loads(tokenizer.decode(text)))
    return whole


def answers(models: dict[str, dict[bool, Any]], tokenizer: Any, count: int) -> dict[str, Any]:
    """How many answers of every model in every mode are whole, cut; anything else raises."""
    grammars = pb.Grammars(tokenizer)
    held = [grammars.compile(pb.Grammar("json_schema", json.dumps(schema(number)))) for number in range(count)]
    prompts = common.questions(tokenizer, test_problems(0, count))
    report: dict[str, Any] = {}
    for name, pair in models.items():
        for mode, changes in MODES.items():
            config = replace(BASE, **changes, max_new_tokens=96)
            with pb.Engine(pair["diffusion" in mode], pb.EngineConfig(max_rows=16)) as engine:
                out = engine.generate(prompts, config, grammar=held)
            whole = sum(fits(grammar, tokens, tokenizer) for grammar, tokens in zip(held, out.tokens, strict=True))
            report[f"{name}, {mode}"] = {"whole_and_valid": whole, "cut_and_prefixes": count - whole, "wrong": 0}
            print(name, mode, report[f"{name}, {mode}"], flush=True)
    return report


def latency(models: dict[bool, Any], tokenizer: Any, repeats: int) -> dict[str, Any]:
    """Time per token with a grammar over that without, turn by turn: the same questions, greedy.

    The grammar allows what is answered anyway, so the answers are alike.
    """
    held = pb.Grammars(tokenizer).compile(pb.Grammar("lark", r'start: /[^\n]*/ ("\n" /[^\n]*/)*'))
    report = {}
    for mode in ("autoregressive", "speculative", "block diffusion, threshold", "block diffusion, verified"):
        config = replace(BASE, **MODES[mode], temperature=0.0, max_new_tokens=96)
        for rows in (1, 16):
            prompts = common.questions(tokenizer, test_problems(0, max(rows, 4)))
            with pb.Engine(models["diffusion" in mode], pb.EngineConfig(max_rows=rows, prefix_cache=False)) as engine:

                def run(grammar: Any, engine: pb.Engine = engine, prompts: Any = prompts, config: Any = config) -> Any:
                    began = time.process_time()
                    out = engine.generate(prompts, config, grammar=grammar)
                    return out, 1000 * (time.process_time() - began) / out.new_tokens

                seen = common.in_turns({"none": partial(run, None), "held": partial(run, held)}, repeats)
            (none, cpu_none), (own, cpu_own) = (zip(*seen[name], strict=True) for name in ("none", "held"))
            wall = [[1000 * out.seconds / out.new_tokens for out in outs] for outs in (own, none)]
            report[f"{mode}, {rows} at once"] = {
                "ms_per_token": common.spread(wall[1]),
                "per_token": common.ratios(*wall),
                "cpu_per_token": common.ratios(cpu_own, cpu_none),
                "equal_answers": sum(a == b for a, b in zip(own[0].tokens, none[0].tokens, strict=True)) / len(prompts),
                "tokens_per_forward": [none[0].tokens_per_forward, own[0].tokens_per_forward],
            }
            print(mode, rows, json.dumps(report[f"{mode}, {rows} at once"]), flush=True)
    return report


def main() -> None:
    args = common.options(__doc__, schemas=200, repeats=9)
    diffusion, tokenizer = load("bundled", device="cpu")
    bundled = {True: diffusion, False: load("bundled-causal", device="cpu")[0]}
    models = {"bundled": bundled, "random": {True: random_model(True), False: random_model(False)}}
    report = {"latency": latency(bundled, tokenizer, args.repeats), "answers": answers(models, tokenizer, args.schemas)}
    common.write("grammars", {"setting": common.setting(args), "repeats": args.repeats, **report})


if __name__ == "__main__":
    main()
