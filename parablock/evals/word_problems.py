"""Accuracy on the bundled task: fresh test problems, decoded in batches, final answers compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parablock.data.chat import encode_prompt
from parablock.data.word_problems import Problem, read_answer, word_problem
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import stream

MAX_NEW_TOKENS = 96  # the longest solution has fewer


@dataclass(frozen=True)
class Accuracy:
    """How many of `problems` were solved, and at what cost; `confidence` and `hit` pair up for the calibration.

    `hit [n]` tells whether the token revealed with `confidence [n]` is the token of the worked solution.
    """

    problems: int
    correct: int
    tokens: int
    decode_forwards: int
    confidence: np.ndarray
    hit: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of problems whose final number is right."""
        return self.correct / self.problems

    @property
    def standard_error(self) -> float:
        """Binomial standard error of `accuracy`."""
        return float(np.sqrt(self.accuracy * (1 - self.accuracy) / self.problems))

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens per decode forward, ratio of sums."""
        return self.tokens / max(1, self.decode_forwards)


def test_problems(seed: int, count: int) -> list[Problem]:
    """`count` problems of the test split; no seed shares one with the training split."""
    return [word_problem("test", seed, index) for index in range(count)]


def is_correct(tokenizer: Any, tokens: Sequence[int], problem: Problem) -> bool:
    """Whether a response's final number is the problem's."""
    return read_answer(tokenizer.decode(list(tokens), skip_special_tokens=True)) == problem.result


def evaluate(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    config: DecodeConfig,
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> Accuracy:
    """Decode every problem's question with `config` and score the answers; `progress(done)` after every batch."""
    correct = tokens = forwards = 0
    confidences: list[np.ndarray] = []
    hits: list[np.ndarray] = []
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        prompts = [encode_prompt(tokenizer, p.messages()[:1]) for p in batch]
        solutions = [tokenizer(p.answer)["input_ids"] + [tokenizer.eos_token_id] for p in batch]
        truth = np.full((len(batch), max(map(len, solutions)) + max(map(len, prompts)) + 64), -1)
        for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
            truth[row, len(prompt) : len(prompt) + len(solution)] = solution
        for step in stream(model, prompts, config):
            r, c = step.revealed.nonzero()
            position = np.minimum(step.start[r] + c, truth.shape[1] - 1)
            known = truth[r, position] >= 0
            confidences.append(step.confidence[r, c][known])
            hits.append((truth[r, position] == step.ids[r, c])[known])
        forwards += int(step.decode_forwards.sum())
        for row, problem in enumerate(batch):
            response = step.tokens(row)
            tokens += len(response)
            correct += is_correct(tokenizer, response, problem)
        if progress:
            progress(start + len(batch))
    return Accuracy(
        len(problems), correct, tokens, forwards, np.concatenate(confidences), np.concatenate(hits).astype(bool)
    )
