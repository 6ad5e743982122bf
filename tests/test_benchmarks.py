"""The pages of figures: verdicts, errors, curves at equal accuracy, the watched loop, and the page from any figures."""

import re
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pandas as pd
import pytest
from common import in_turns, spread
from conftest import small_model
from figures import Estimate, above, apart, at_equal_accuracy, mean, rates, share, sizes, speed_at, within
from page import PAGES, measured, plain, points, render
from paper_decoding import MODELS, SUB_BLOCKS, SWEEPS, THRESHOLDS
from paper_staleness import Watch, means

import parablock as pb

DOCS = Path(__file__).parents[1] / "docs"


def by_model(*groups: Any) -> pd.Series:
    return pd.concat({f"seed-{i}": pd.Series(values) for i, values in enumerate(groups)})


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


def test_of_several_parts_all_must_be_right_and_none_wrong() -> None:
    error = np.full(3, 0.1)
    assert above(Estimate(np.array([1.0, 2.0, np.nan]), error)) == "Agrees"
    assert above(Estimate(np.array([1.0, 0.1, 1.0]), error)) == "Cannot tell"
    assert above(Estimate(np.array([1.0, 0.1, -1.0]), error)) == "Disagrees"
    assert within(Estimate(np.array([0.0, 0.5, -0.5]), error), 1.0) == "Agrees"


def test_errors_within_and_between_seeds() -> None:
    found = mean(by_model(np.repeat([1, 0], [80, 20]), np.repeat([1, 0], [60, 40])))
    assert found.value == pytest.approx(0.7)
    assert found.within == pytest.approx((0.16 / 99 + 0.24 / 99) ** 0.5 / 2)  # binomial
    assert found.between == pytest.approx(0.1)
    assert found.error == found.between
    assert share(by_model(np.ones(50))).within == pytest.approx(1 / 50)  # none wrong, but no certainty
    assert mean(by_model(np.ones(50))).error == 0.0
    frame = pd.DataFrame({"a": by_model([1, 0], [1, 1]), "b": by_model([3, 5], [np.nan, np.nan])})
    assert mean(frame).value == pytest.approx([0.75, 4.0])  # of the models that have values
    assert mean(frame)[1].value == mean(frame["b"]).value == 4.0


def test_pairs() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(400)
    frame = pd.DataFrame({n: by_model((hard < n).astype(int)) for n in (0.8, 0.75)})  # right on the easy ones
    together, separate = share(frame[0.8] - frame[0.75]), apart(frame, {0.8: 1, 0.75: -1})
    assert together.value == pytest.approx(separate.value)
    assert together.within < 0.5 * separate.within
    tokens, forwards = generator.integers(20, 60, 400), generator.integers(5, 20, 400)
    rate = mean(rates(pd.DataFrame({"a": by_model(tokens)}), pd.DataFrame({"a": by_model(forwards)}))["a"])
    assert rate.value == pytest.approx(tokens.sum() / forwards.sum())
    draws = generator.integers(0, 400, (500, 400))
    assert rate.within == pytest.approx((tokens[draws].sum(1) / forwards[draws].sum(1)).std(), rel=0.15)


def test_speed_at_equal_accuracy() -> None:
    accuracy, speed = np.array([0.6, 0.9, 0.8]), np.array([6.0, 1.0, 2.0])  # any order
    assert speed_at(accuracy, speed, 0.85) == pytest.approx(1.5)
    assert speed_at(accuracy, speed, 0.7) == pytest.approx(4.0)
    assert speed_at(accuracy, speed, 0.9) == pytest.approx(1.0)
    assert np.isnan(speed_at(accuracy, speed, 0.91))
    assert speed_at(accuracy, speed, 0.5) == 6.0  # not beyond what was measured
    assert speed_at(np.array([0.9, 0.7, 0.8, 0.6]), np.arange(4.0), 0.75) == 2.0  # what rises is averaged
    right = np.arange(100) < 90
    right = pd.DataFrame({f"{s} {v:g}": by_model(right) for s, (_, vs) in SWEEPS.items() for v in vs}).astype(int)
    forwards = right * 0 + [40, *[10] * 8, *[20] * 9, 40, *[5] * 8]
    # as accurate at every speed: the fastest of each counts
    found = at_equal_accuracy({"right": right, "tokens": right * 0 + 40, "forwards": forwards})
    assert found.value[:, 0] == pytest.approx([4, 2, 8, 0.5, 0.25, 0.5])
    assert (found.error < 1e-9).all()


def test_settings_by_size_and_cells() -> None:
    frame = pd.DataFrame({"block 2": [1], "block 16, sub-block 8": [2], "block 0.5": [3], "4, on": [4]})
    assert list(sizes(frame, "block ")) == ["2", "0.5"]
    assert list(sizes(frame, suffix=", on")) == ["4"]
    assert points(Estimate(0.123, 0.01)) == "+12.3 ± 1.0"
    assert plain(Estimate(float("nan"))) == "none"
    assert plain(Estimate(2.0), "x") == "2.00x"  # no error is no error of zero


def test_turns_rotate_after_a_warm_up() -> None:
    order: list[str] = []
    found = in_turns({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 2)
    assert "".join(order) == "abbaab"
    assert found == {"a": [4, 5], "b": [3, 6]}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "min": 1.0, "max": 3.0}


def test_watching_sees_the_steps_and_the_kept_kv() -> None:
    model = small_model()
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13], list(range(5, 24))]
    for threshold, most in ((1.0, 1), (0.2, 4)):
        watch = Watch(model, pb.DecodeConfig(
            block_size=8, sub_block_size=4, threshold=threshold, max_new_tokens=24, stop_token_ids=(),
        ))  # fmt: skip
        for prompt in prompts:
            watch.answer(prompt)
        steps = watch.counts["steps"]
        assert 0 < steps < watch.counts["denoising"]
        assert watch.counts["as_decoded"] == steps  # the stock model makes the decoder's forwards again
        assert steps <= watch.counts["revealed"] <= most * steps
        kv = pd.DataFrame(means(watch.kv)).set_index(["by", "at"])
        assert (kv.loc[("layer", 0), "relative_l2"] < 1e-5).all()  # a token's own: they cannot age
        assert (kv.loc[("layer", 1), "relative_l2"] > 1e-3).all()
        assert set(kv.loc["distance"].index) <= {-1, 1}
        assert set(kv.loc["revealed"].index) <= {1, 2, 3}
    watch = Watch(model, pb.DecodeConfig(block_size=8, sub_block_size=4, max_new_tokens=8, sub_block_cache=False))
    watch.answer(prompts[0])
    assert "steps" not in watch.counts


def made_up(solved: dict[str, float], repeats: int = 3, problems: int = 400) -> dict[str, Any]:
    """Results of every part: `solved` of the answers is right where its key occurs in the setting's name (else 0.8)."""
    generator = np.random.default_rng(1)
    setting = {"command": "c", "commit": "abc", "processor": "p", "torch": "2", "transformers": "5"}

    def answers(settings: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in MODELS:
            hard = generator.random(problems)
            found[name] = {
                key: {
                    "right": "".join(str(int(h < next((s for k, s in solved.items() if k in key), 0.8))) for h in hard),
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
         **{m: {"correct": int(300 * solved.get(v, 0.8)), "problems": 300, "tokens_per_forward": 2.0}
            for m in ("diffusion", "autoregressive")}}
        for v in ("naive", "+ padding", "+ complementary", "isolated", "clean first token", "AR loss 0.5")
        for seed in range(3)
    ]  # fmt: skip
    blocks = [f"block {n}" for n in SUB_BLOCKS[1:-1]] + ["block 16, sub-block 8"]
    blocks += [f"sub-block {n}" for n in SUB_BLOCKS[1:]]
    by_threshold = [{"mode": "diffusion", "threshold": t} for t in THRESHOLDS]
    kv = [
        {"kind": kind, "by": by, "at": 1, "count": 9, "cosine": 0.99, "relative_l2": 0.1}
        for kind in ("keys", "values") for by in ("layer", "distance", "revealed")
    ]  # fmt: skip
    counts = {"denoising": 900, "steps": 400, "tokens": 900, "revealed": 500}
    watched = {name: {"0.9": {"counts": counts, "kv": kv}, "1.0": {"counts": counts, "kv": kv}} for name in MODELS}
    watched["seed-1"] = {key: {"counts": {"denoising": 9}, "kv": []} for key in ("0.9", "1.0")}  # no narrow step
    states = [f"{size}, {state}" for size in SUB_BLOCKS[1:] for state in ("on", "off")]
    return {
        "training": {"setting": setting, "runs": runs},
        "sub-blocks": base | {"answers": answers([str(s) for s in SUB_BLOCKS])},
        "block-sizes": base | {"answers": answers(blocks)},
        "thresholds": base | {
            "answers": answers([*map(str, THRESHOLDS), "AR mode", "bundled-ar"]),
            "speeds": speeds([{"mode": "autoregressive", "threshold": None}, *by_threshold]),
        },
        "cache": base | {
            "answers": answers(states), "by_batch": speeds(cached((1, 4, 16, 32, 64), (8,))),
            "by_sub_block": speeds(cached((1, 32), (2, 4, 16, 32))),
        },
        "strategies": base | {"answers": answers([f"{s} {v:g}" for s, (_, vs) in SWEEPS.items() for v in vs])},
        "staleness": base | {"staleness": watched, "stale_problems": 50},
    }  # fmt: skip


def test_the_page_says_what_the_figures_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DRAWS", 20)

    def page(solved: dict[str, float]) -> str:
        return render("results", made_up(solved), tmp_path)

    def sentence(text: str, about: str) -> str:
        return next(line for line in text.splitlines() if about in line)

    padding, mismatch, cached = "padding to whole blocks", "smaller blocks than in training", "leaves accuracy as it is"
    same = page({})
    assert len(re.findall(r"^- (Agrees that|Disagrees that|Cannot tell whether) .*; paper: ", same, re.M)) == 20
    assert "nan" not in same
    assert sentence(same, padding).startswith("- Cannot tell whether")
    assert sentence(same, cached).startswith("- Agrees that")
    for name in re.findall(r"\(images/(.*?)\)", same):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for_it = page({"naive": 0.5, "sub-block": 0.8, "block": 0.5})
    assert sentence(for_it, padding).startswith("- Agrees that")
    assert sentence(for_it, mismatch).startswith("- Agrees that")
    against = page({"+ padding": 0.5, "sub-block": 0.5, "block": 0.8, ", on": 0.6})
    for about in (padding, mismatch, cached):
        assert sentence(against, about).startswith("- Disagrees that")


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_of_the_docs_are_those_of_the_results(name: str, tmp_path: Path) -> None:
    assert render(name, measured(PAGES[name]), tmp_path) == (DOCS / f"{name}.md").read_text()


def test_what_is_not_measured_is_named() -> None:
    with pytest.raises(SystemExit, match=r"run: python benchmarks/paper\.py nothing$"):
        measured({"paper": ["cache", "nothing"]})
    with pytest.raises(SystemExit, match=r"run: python benchmarks/nothing\.py$"):
        measured({"paper": ["cache"], "nothing": []})
