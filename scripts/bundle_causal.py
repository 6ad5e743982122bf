"""Put the trained causal adapter into the package, evaluated as shipped (see `bundled_problems.py`).

python scripts/bundle_causal.py runs/bundled/causal
"""

import argparse
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import parablock as pb
from parablock.checkpoints.named import BUNDLED
from parablock.data.chat import encode_prompt
from parablock.evals.word_problems import MAX_NEW_TOKENS, is_correct, test_problems

FIGURES = """
## How it was made, and what it does

Trained by `recipes/bundled/causal.yaml` on the model's own answers: {steps} steps, {minutes:.0f} minutes on one core.

{count} fresh problems (seed {seed}), greedy, float32, `draft_tokens=7`:

| decoder | accuracy | tokens per forward | other answers than AR's |
|---|---|---|---|
| AR | {ar:.1f} % | 1 | |
| speculative, masks | {speculative:.1f} % | {per_forward:.2f} | {others} |
"""


def main() -> None:
    """Copy, evaluate, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2026, help="of the test problems")
    given = parser.parse_args()
    target = BUNDLED / "causal"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(given.run / "model", target)

    model, tokenizer = pb.load(target)
    problems = test_problems(given.seed, given.problems)
    prompts = [encode_prompt(tokenizer, problem.messages()[:1]) for problem in problems]
    decode = pb.DecodeConfig(mode="autoregressive", max_new_tokens=MAX_NEW_TOKENS)
    drafts = replace(decode, mode="speculative", drafter="masks", draft_tokens=7)
    with pb.Engine(model) as engine:
        ar, speculative = engine.generate(prompts, decode), engine.generate(prompts, drafts)
    right = [
        sum(is_correct(tokenizer, tokens, problem) for tokens, problem in zip(out.tokens, problems, strict=True))
        for out in (ar, speculative)
    ]
    log = [json.loads(line) for line in (given.run / "log.jsonl").read_text().splitlines()]
    report = json.loads((given.run / "report.json").read_text())
    figures = FIGURES.format(
        steps=log[-1]["step"], minutes=report["seconds"] / 60, count=given.problems, seed=given.seed,
        ar=100 * right[0] / len(problems), speculative=100 * right[1] / len(problems),
        per_forward=speculative.tokens_per_forward,
        others=sum(a != b for a, b in zip(ar.tokens, speculative.tokens, strict=True)),
    )  # fmt: skip
    card = target / "README.md"
    card.write_text(card.read_text().rstrip() + "\n" + figures)
    print(figures)


if __name__ == "__main__":
    main()
