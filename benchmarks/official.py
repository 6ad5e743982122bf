"""The published Fast-dLLM v2 decoder's way against parablock's: the same tokens, from the model calls that each makes.

    python benchmarks/official.py                  # bundled, 135m and 0.5b: a quarter of an hour on two cores
    python benchmarks/official.py 135m             # some of them; 0.5b-batch, as long as all others, by name alone

`official_decoding.py` makes the published calls on a stock model, then gives up one habit after the other, until
parablock's own loop, its engine, and the compiled engine take over. One request, and 8 together; prompts of 45 and of
300 tokens; greedy, float32, threshold 0.9. All take turns; in the first one, which is not timed, all who must agree are
seen to decode the same tokens. Writes `benchmarks/results/official.json`.

The bundled model answers its own questions, up to its stop token. Behind 300 tokens of earlier questions and solutions,
which it has not learned to read, it decodes `--new-tokens`. So do the other sizes: the shapes of SmolLM2-135M and
Qwen2.5-0.5B with random weights, made decisive (see `decisive`), so that a forward reveals two or three tokens.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import common
import numpy as np
import torch
from official_decoding import Way, decode
from transformers import AutoModelForCausalLM

import parablock as pb
from parablock.bench.shapes import random_model
from parablock.checkpoints.named import BUNDLED_MODELS
from parablock.data.chat import encode_prompt
from parablock.evals.word_problems import test_problems

ONE, MANY, SHORT, LONG = 1, 8, 45, 300  # requests; tokens of their prompts
PARTS = {"bundled": (ONE, MANY), "135m": (ONE, MANY), "0.5b": (ONE,), "0.5b-batch": (MANY,)}
DEFAULT = ("bundled", "135m", "0.5b")
LIMIT = 96  # of an answer that ends with a stop token
PUBLISHED, OWN_CACHE, GENERATE = "published loop", "with its sub-block cache", "stopping at once"
HABITS = {  # one after the other is given up: with the sub-block cache?, how
    PUBLISHED: (False, Way()),
    OWN_CACHE: (True, Way()),
    GENERATE: (True, Way(stop_at_once=True)),
    "head where a token is wanted": (True, Way(stop_at_once=True, head_everywhere=False)),
    "K/V in place, no mask": (True, Way(stop_at_once=True, head_everywhere=False, concatenate=False)),
}
OPTIONS = {ONE: (PUBLISHED, OWN_CACHE, GENERATE), MANY: (PUBLISHED, OWN_CACHE)}  # what the published code offers itself
UNCACHED, CACHED = "pb.generate, no sub-block cache", ("pb.generate", "engine", "engine, compiled")  # parablock's own

Prompts = list[list[int]]
Make = Callable[[Prompts, pb.DecodeConfig], pb.GenerateOutput]
Contenders = dict[str, tuple[bool, Make]]  # with the sub-block cache?, how


def stock(size: str) -> Any:
    """The model that the published loop calls, as transformers makes it."""
    if size == "bundled":
        return AutoModelForCausalLM.from_pretrained(BUNDLED_MODELS[size], dtype=torch.float32).eval()
    return decisive(random_model(size, block_size=32, dtype=torch.float32, device="cpu"))


def ours(size: str) -> Any:
    """The same weights for parablock. Whatever it does to a model before it decodes belongs here."""
    if size == "bundled":
        return pb.load(size, device="cpu", dtype="float32")[0]
    model = stock(size)
    pb.pack(model)  # as `load` does
    return model


@torch.no_grad()
def decisive(model: Any) -> Any:
    """Random weights whose predictions differ from place to place, and of which some are sure.

    As initialised, all masks of a block look alike and no token is likely, so a forward reveals one. Matrices twice as
    large tell the places apart; logits 30 times as large (the last norm is scaled: the head shares its weight with the
    embeddings) bring about a third of the predictions above the threshold.
    """
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(2)
    model.get_decoder().norm.weight.mul_(30)
    return model


def prompts_of(size: str, length: int, seed: int) -> Prompts:
    """`MANY` prompts of `length` tokens, or of about as many."""
    if size != "bundled":
        return np.random.default_rng([seed, length]).integers(0, 49000, (MANY, length)).tolist()
    _, tokenizer = pb.load(size, device="cpu")
    problems = test_problems(seed, 5 * MANY)  # five with their solutions are longer than the longest prompt
    if length == SHORT:
        return common.questions(tokenizer, problems[:MANY])
    chats = [[m for problem in problems[i::MANY] for m in problem.messages()][:-1] for i in range(MANY)]
    return [encode_prompt(tokenizer, chat)[-length:] for chat in chats]


def contenders(plain: Any, own: Any, engine: pb.Engine, compiled: pb.Engine) -> Contenders:
    loops = {name: (cached, partial(decode, plain, way=way)) for name, (cached, way) in HABITS.items()}
    generate: Make = partial(pb.generate, own)
    makes = zip(CACHED, (generate, engine.generate, compiled.generate), strict=True)
    return {**loops, UNCACHED: (False, generate), **{name: (True, make) for name, make in makes}}


def must_agree(name: str, requests: int) -> str:
    """Contenders with the same answer decode the same tokens.

    With the sub-block cache, the rows of a published batch run their whole block when one of them needs to, so that
    their tokens depend on their neighbours. All others' do not.
    """
    if name in (PUBLISHED, UNCACHED):
        return "without the sub-block cache"
    return "with it" if name in CACHED or requests == ONE else f"in a batch, {name}"


def measure(
    runs: Contenders, batches: list[Prompts], config: pb.DecodeConfig, threads: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Every contender's time per token, and how many times faster than the published loop that is, turn by turn."""
    first: dict[str, tuple[str, Prompts]] = {}
    requests = len(batches[0])

    def turn(name: str) -> list[pb.GenerateOutput]:
        cached, make = runs[name]
        torch.set_num_threads(threads)
        outs = [make(batch, replace(config, sub_block_cache=cached)) for batch in batches]
        tokens = [row for out in outs for row in out.tokens]
        other, expected = first.setdefault(must_agree(name, requests), (name, tokens))
        if tokens != expected:
            raise SystemExit(f"{name} decodes other tokens than {other}; if a tie decides, another --seed has none")
        return outs

    turns = common.in_turns({name: partial(turn, name) for name in runs}, repeats)
    new = {name: sum(out.new_tokens for out in outs) for name, (outs, *_) in turns.items()}
    took = {name: [1000 * sum(o.seconds for o in outs) / new[name] for outs in seen] for name, seen in turns.items()}
    return {
        name: {
            "milliseconds_per_token": common.spread(took[name]),
            "over_published": common.ratios(took[PUBLISHED], took[name]),
            "over_options": common.ratios(list(map(min, *(took[option] for option in OPTIONS[requests]))), took[name]),
            "tokens_per_forward": new[name] / sum(sum(out.decode_forwards) for out in outs),
            "tokens_per_answer": new[name] / sum(len(out.tokens) for out in outs),
            "forwards": sum(out.forwards for out in outs) / len(outs),
        }
        for name, (outs, *_) in turns.items()
    }


def measure_part(part: str, args: Any) -> list[dict[str, Any]]:
    """The cases of a part: its contenders by requests and prompts."""
    size, cases = part.removesuffix("-batch"), []
    plain, own = stock(size), ours(size)
    torch.set_num_threads(args.threads)
    room = pb.EngineConfig(max_rows=MANY, max_context=512, prefix_cache=False)
    with ExitStack() as stack:
        engines = [stack.enter_context(pb.Engine(own, replace(room, compile=how))) for how in (False, True)]
        for requests, length in itertools.product(PARTS[part], (SHORT, LONG)):
            prompts = prompts_of(size, length, args.seed)
            ends = size == "bundled" and length == SHORT
            limit, stops = (LIMIT, (own.config.eos_token_id,)) if ends else (args.new_tokens, ())
            batches = [prompts] if requests == MANY else [[prompt] for prompt in (prompts if ends else prompts[:1])]
            runs = contenders(plain, own, *engines)
            if requests == MANY and size != "bundled":  # what lies between takes minutes
                runs = {name: runs[name] for name in (*OPTIONS[MANY], UNCACHED, *CACHED)}
            found = measure(
                runs, batches,
                pb.DecodeConfig(threshold=0.9, max_new_tokens=limit, stop_token_ids=stops),
                1 if size == "bundled" and requests == ONE else args.threads,  # too little to share
                args.repeats if size == "bundled" else args.large_repeats,
            )  # fmt: skip
            fastest = max((UNCACHED, *CACHED), key=lambda name: found[name]["over_published"]["median"])
            cases.append({"requests": requests, "prompt_tokens": length, "fastest": fastest, "contenders": found})
            show(size, cases[-1])
    return cases


def show(size: str, case: dict[str, Any]) -> None:
    print(f"{size}, {case['requests']} request(s), prompts of {case['prompt_tokens']} tokens")
    for name, found in case["contenders"].items():
        over, ms = found["over_published"], found["milliseconds_per_token"]["median"]
        numbers = f"{ms:9.2f} ms/token {found['tokens_per_forward']:6.2f} tokens/forward"
        print(f"  {name:32}{over['median']:7.2f}x ({over['low']:.2f} to {over['high']:.2f}) {numbers}", flush=True)


def main() -> None:
    args = common.options(
        __doc__, PARTS, repeats=5, large_repeats=3, new_tokens=40, seed=1, threads=torch.get_num_threads()
    )  # fmt: skip
    sizes: dict[str, list[dict[str, Any]]] = {}
    for part in args.parts or DEFAULT:
        sizes.setdefault(part.removesuffix("-batch"), []).extend(measure_part(part, args))
    common.write("official", {"setting": common.setting(args, *args.parts), "sizes": sizes})


if __name__ == "__main__":
    main()
