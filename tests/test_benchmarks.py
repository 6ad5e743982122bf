"""The paper's tables: verdicts, errors, curves at equal accuracy, the watched loop, and the page from any figures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_model
from paper_decoding import BATCHES, BLOCKS, CACHE_SUB_BLOCKS, SUB_BLOCKS, SWEEPS, THRESHOLDS
from paper_page import page
from paper_staleness import Watch
from paper_statistics import (
    Estimate,
    above,
    by_seed,
    estimate,
    falling,
    paired,
    paired_ratio,
    rates,
    resampled,
    speed_at,
    together,
    within,
)  # fmt: skip

import parablock as pb

MODELS = ("seed-0", "seed-1", "seed-2", "bundled")


def test_two_errors_decide() -> None:
    assert above(Estimate(0.05, 0.02)) == "Agrees"
    assert above(Estimate(0.05, 0.02, 0.03)) == "Cannot tell"  # the larger error counts
    assert above(Estimate(-0.05, 0.02)) == "Disagrees"
    assert above(Estimate(0.0, 0.0)) == "Cannot tell"
    assert above(Estimate(float("nan"), 0.1)) == "Cannot tell"
    assert above(Estimate(-0.01, 0.004), -0.02) == "Agrees"
    assert within(Estimate(0.01, 0.004), 0.02) == "Agrees"
    assert within(Estimate(0.01, 0.006), 0.02) == "Cannot tell"
    assert within(Estimate(0.05, 0.01), 0.02) == within(Estimate(-0.05, 0.01), 0.02) == "Disagrees"
    assert together(["Agrees", "Agrees"]) == "Agrees"
    assert together(["Agrees", "Cannot tell"]) == together([]) == "Cannot tell"
    assert together(["Agrees", "Cannot tell", "Disagrees"]) == "Disagrees"


def test_errors_within_and_between_seeds() -> None:
    groups = [np.repeat([1.0, 0.0], [80, 20]), np.repeat([1.0, 0.0], [60, 40])]
    mean = estimate(groups)
    assert mean.value == pytest.approx(0.7)
    assert mean.within == pytest.approx((0.16 / 99 + 0.24 / 99) ** 0.5 / 2)  # binomial
    assert mean.between == pytest.approx(0.1)
    assert mean.error == mean.between
    assert estimate([np.ones(50)], step=1.0).within == pytest.approx(1 / 50)  # none wrong, but no certainty
    assert estimate([np.ones(50)]).error == 0.0


def test_pairs() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(400)
    first, second = (hard < 0.8).astype(float), (hard < 0.75).astype(float)  # right on the easy ones
    together_, apart = paired([first], [second]), by_seed([first], [second])
    assert together_.value == pytest.approx(apart.value)
    assert together_.within < 0.5 * apart.within
    assert paired_ratio([np.array([2.0, 3.0])], [np.array([1.0, 2.0])]).value == pytest.approx(1.75)
    tokens, forwards = generator.integers(20, 60, 400), generator.integers(5, 20, 400)
    rate = estimate(rates([tokens], [forwards]))
    assert rate.value == pytest.approx(tokens.sum() / forwards.sum())
    drawn = resampled([400], lambda i: np.array([tokens[i[0]].sum() / forwards[i[0]].sum()]), 500)
    assert rate.within == pytest.approx(drawn.std(), rel=0.15)
    assert (drawn == resampled([400], lambda i: np.array([tokens[i[0]].sum() / forwards[i[0]].sum()]), 500)).all()


def test_speed_at_equal_accuracy() -> None:
    assert falling(np.array([0.9, 0.95, 0.7, 0.8, 0.6])) == pytest.approx([0.925, 0.925, 0.75, 0.75, 0.6])
    accuracy, speed = np.array([0.6, 0.9, 0.8]), np.array([6.0, 1.0, 2.0])  # any order
    assert speed_at(accuracy, speed, 0.85) == pytest.approx(1.5)
    assert speed_at(accuracy, speed, 0.7) == pytest.approx(4.0)
    assert speed_at(accuracy, speed, 0.9) == pytest.approx(1.0)
    assert np.isnan(speed_at(accuracy, speed, 0.91))
    assert speed_at(accuracy, speed, 0.5) == 6.0  # not beyond what was measured


def test_watching_changes_nothing_and_sees_kept_kv() -> None:
    model = small_model()
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    config = pb.DecodeConfig(
        block_size=8, sub_block_size=4, threshold=1.0, max_new_tokens=24, stop_token_ids=(), mask_token_id=63,
    )  # fmt: skip
    plain = pb.generate(model, prompts, config)
    watch = Watch(config)
    watch.decode(model, prompts)
    assert pb.generate(model, prompts, config).tokens == plain.tokens
    assert 0 < watch.counts["steps"] < watch.counts["denoising"]
    assert watch.counts["revealed"] == watch.counts["steps"]  # one at a time
    first = [sums for (_, by, at), sums in watch.kv.items() if (by, at) == ("layer", 0)]
    later = [sums for (_, by, at), sums in watch.kv.items() if (by, at) == ("layer", 1)]
    assert all(distance < 1e-5 * count for count, _, distance in first)  # a token's own: they cannot age
    assert all(distance > 1e-3 * count for count, _, distance in later)
    assert {since for _, by, since in watch.kv if by == "revealed"} <= {1, 2, 3}
    uncached = Watch(pb.DecodeConfig(**{**vars(config), "sub_block_cache": False}))
    uncached.decode(model, prompts)
    assert "steps" not in uncached.counts
    assert torch.is_inference_mode_enabled() is False


def made_up(share: dict[str, float], repeats: int = 3, problems: int = 400) -> dict[str, Any]:
    """Results of every part: `share` of the answers is right where its key occurs in the setting's name (else 0.8)."""
    generator = np.random.default_rng(1)
    setting = {"command": "c", "commit": "abc", "processor": "p", "torch": "2", "transformers": "5"}

    def answers(settings: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in MODELS:
            hard = generator.random(problems)
            found[name] = {
                key: {
                    "right": "".join(str(int(h < next((s for k, s in share.items() if k in key), 0.8))) for h in hard),
                    "tokens": " ".join(["40"] * problems),
                    "forwards": " ".join(str(int(n)) for n in generator.integers(8, 12, problems) + at),
                }
                for at, key in enumerate(settings)
            }
        return found

    def speeds(cases: list[dict[str, Any]]) -> dict[str, Any]:
        fields = ("tokens_per_second", "tokens_per_forward", "queries_per_token")
        return {n: [c | {f: list(100 + generator.random(repeats)) for f in fields} for c in cases] for n in MODELS}

    def cached(in_flight: tuple[int, ...], sizes: tuple[int, ...]) -> list[dict[str, Any]]:
        ar = {"mode": "autoregressive", "sub_block": None, "cache": None}
        return [
            {"in_flight": n} | case for n in in_flight for case in
            [ar, *({"mode": "diffusion", "sub_block": s, "cache": on} for s in sizes for on in (True, False))]
        ]  # fmt: skip

    base = {"setting": setting, "problems": problems, "repeats": repeats}
    runs = [
        {"variant": v, "seed": seed, "steps": 200, "commit": "abc",
         **{m: {"correct": int(300 * share.get(v, 0.8)), "problems": 300}
            for m in ("diffusion", "autoregressive")}}
        for v in ("naive", "+ padding", "+ complementary", "isolated", "clean first token", "AR loss 0.5")
        for seed in range(3)
    ]  # fmt: skip
    rows = [{"variant": r["variant"], "seeds": 3, "diffusion": {"tokens_per_forward": 2.0}} for r in runs[::3]]
    blocks = [f"block {b}" for b in BLOCKS if b < 32] + ["block 16, sub-block 8"] + [f"sub-block {b}" for b in BLOCKS]
    by_threshold = [{"mode": "diffusion", "threshold": t} for t in THRESHOLDS]
    kv = [
        {"kind": kind, "by": by, "at": 1, "count": 9, "cosine": 0.99, "relative_l2": 0.1}
        for kind in ("keys", "values") for by in ("layer", "distance", "revealed")
    ]  # fmt: skip
    counts = {"denoising": 900, "steps": 400, "tokens": 900, "revealed": 500}
    watched = {name: {"0.9": {"counts": counts, "kv": kv}, "1.0": {"counts": counts, "kv": kv}} for name in MODELS}
    watched["seed-1"] = {key: {"counts": {"denoising": 9}, "kv": []} for key in ("0.9", "1.0")}  # no narrow step
    states = [f"{size}, {state}" for size in CACHE_SUB_BLOCKS for state in ("on", "off")]
    return {
        "training": {"setting": setting, "rows": rows, "runs": runs},
        "sub-blocks": base | {"answers": answers([str(s) for s in SUB_BLOCKS])},
        "block-sizes": base | {"answers": answers(blocks)},
        "thresholds": base | {
            "answers": answers([*map(str, THRESHOLDS), "AR mode", "bundled-ar"]),
            "speeds": speeds([{"mode": "autoregressive", "threshold": None}, *by_threshold]),
        },
        "cache": base | {
            "answers": answers(states), "by_batch": speeds(cached(BATCHES, (8,))),
            "by_sub_block": speeds(cached((1, 32), (2, 4, 16, 32))),
        },
        "strategies": base | {"answers": answers([f"{s} {v:g}" for s, (_, vs) in SWEEPS.items() for v in vs])},
        "staleness": base | {"staleness": watched, "stale_problems": 50},
    }  # fmt: skip


def test_the_page_says_what_the_figures_say(tmp_path: Path) -> None:
    def sentence(text: str, about: str) -> str:
        return next(line for line in text.splitlines() if about in line)

    padding, mismatch, cached = "padding to whole blocks", "smaller blocks than in training", "leaves accuracy as it is"
    same = page(made_up({}), tmp_path)
    assert len(re.findall(r"^- (Agrees that|Disagrees that|Cannot tell whether) .*; paper: ", same, re.M)) == 20
    assert "nan" not in same
    assert sentence(same, padding).startswith("- Cannot tell whether")
    assert sentence(same, cached).startswith("- Agrees that")
    for name in re.findall(r"\(images/(.*?)\)", same):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for_it = page(made_up({"naive": 0.5, "sub-block": 0.8, "block": 0.5}), tmp_path)
    assert sentence(for_it, padding).startswith("- Agrees that")
    assert sentence(for_it, mismatch).startswith("- Agrees that")
    against = page(made_up({"+ padding": 0.5, "sub-block": 0.5, "block": 0.8, ", on": 0.6}), tmp_path)
    for about in (padding, mismatch, cached):
        assert sentence(against, about).startswith("- Disagrees that")
    assert "Not measured yet: training" in page({"cache": made_up({})["cache"]}, tmp_path)
