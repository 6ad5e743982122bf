"""Decoders side by side: the same prompts, one request at a time, in turns, each decoder at its own best setting.

Speed is compared only within one run: every prompt is answered by every contender before the next prompt, in an order
that rotates, so that whatever else the machine does hits all of them alike.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from parablock.data.chat import encode_prompt
from parablock.data.word_problems import Problem
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import GenerateOutput, generate
from parablock.engine.config import EngineConfig
from parablock.engine.engine import Engine
from parablock.evals.word_problems import is_correct

ALONE = EngineConfig(max_rows=1, prefix_cache=False)  # one request at a time, each from its beginning


@dataclass(frozen=True)
class Contender:
    """A model with a way to decode it."""

    name: str
    model: Any
    config: DecodeConfig


@dataclass(frozen=True)
class Result:
    """One contender's row of the table.

    `tokens_per_second`: response tokens over seconds, prefill included, ratio of sums (tps per request). `speed_up`:
    median over prompts of (first contender's seconds per token / this one's), with its quartiles in `speed_up_range`.
    `same_answers`: the share of answers that are the first contender's, token for token.
    """

    name: str
    dtype: str
    prompts: int
    tokens_per_second: float
    tokens_per_forward: float
    milliseconds_per_forward: float
    speed_up: float
    speed_up_range: tuple[float, float]
    same_answers: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Solved(Result):
    """The same where answers are right or wrong."""

    accuracy: float
    standard_error: float


def take_turns(
    contenders: Sequence[Contender], prompts: Sequence[list[int]], progress: Callable[[int], None] | None = None
) -> list[list[GenerateOutput]]:
    """Let every contender answer every prompt, batch 1; `progress(done)` after every prompt."""
    outputs: list[list[GenerateOutput]] = [[] for _ in contenders]
    with ExitStack() as opened:
        engines: dict[int, Engine] = {}  # by model
        for contender in contenders:
            if id(contender.model) not in engines:
                engines[id(contender.model)] = opened.enter_context(Engine(contender.model, ALONE))
        for number, prompt in enumerate(prompts):
            for turn in range(len(contenders)):
                which = (number + turn) % len(contenders)
                engine, config = engines[id(contenders[which].model)], contenders[which].config
                if number == 0:
                    engine.generate(prompt, replace(config, max_new_tokens=8))  # warm up
                outputs[which].append(engine.generate(prompt, config))
            if progress:
                progress(number + 1)
    return outputs


def measure(contender: Contender, outputs: Sequence[GenerateOutput], baseline: Sequence[GenerateOutput]) -> Result:
    """A contender's row; speed-ups are relative to `baseline`."""
    tokens = sum(o.new_tokens for o in outputs)
    seconds = sum(o.seconds for o in outputs)
    ratios = sorted(o.tokens_per_second / b.tokens_per_second for o, b in zip(outputs, baseline, strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Result(
        name=contender.name,
        dtype=str(contender.model.dtype).removeprefix("torch."),
        prompts=len(outputs),
        tokens_per_second=tokens / seconds,
        tokens_per_forward=tokens / max(1, sum(sum(o.decode_forwards) for o in outputs)),
        milliseconds_per_forward=1000 * seconds / sum(o.forwards for o in outputs),
        speed_up=statistics.median(ratios),
        speed_up_range=(quartiles[0], quartiles[2]),
        same_answers=statistics.mean(o.tokens == b.tokens for o, b in zip(outputs, baseline, strict=True)),
    )


def compare(
    contenders: Sequence[Contender],
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Solved]:
    """Let every contender solve every problem; speed-ups are relative to the first contender."""
    prompts = [encode_prompt(tokenizer, problem.messages()[:1]) for problem in problems]
    outputs = take_turns(contenders, prompts, progress)
    results = []
    for contender, mine in zip(contenders, outputs, strict=True):
        accuracy = statistics.mean(is_correct(tokenizer, o.tokens[0], p) for o, p in zip(mine, problems, strict=True))
        error = (accuracy * (1 - accuracy) / len(problems)) ** 0.5
        speed = measure(contender, mine, outputs[0])
        results.append(Solved(**vars(speed), accuracy=accuracy, standard_error=error))
    return results


def fastest(models: Sequence[Any], config: DecodeConfig, prompt: list[int], *, repeats: int = 5) -> Any:
    """Which of `models` (one per dtype) decodes `prompt` fastest: the best of `repeats` each."""
    best = [math.inf] * len(models)
    config = replace(config, max_new_tokens=32, stop_token_ids=())  # the same number of tokens with every model
    for _ in range(repeats):
        for number, model in enumerate(models):
            out = generate(model, prompt, config)
            best[number] = min(best[number], out.seconds / out.forwards)
    return models[best.index(min(best))]
