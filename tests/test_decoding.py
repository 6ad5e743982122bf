"""The decoding loops: golden generations, batches, ragged rows, limits, stops, sampling, strategies."""

import itertools
from dataclasses import replace
from typing import Any

import definitions
import numpy as np
import pytest
import torch
from conftest import ar_model, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

import parablock as pb
from parablock.decoding.unmasking import propose, reveal, uniform

D, S, MASK, STOP = 8, 4, 63, 62
BASE = pb.DecodeConfig(sub_block_size=S, max_new_tokens=24, threshold=0.5, stop_token_ids=())


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_golden_generations(golden_model: Any, golden_generations: list[dict[str, Any]]) -> None:
    assert len(golden_generations) == 48
    assert {g["sub_block_cache"] for g in golden_generations} == {True, False}
    for g in golden_generations:
        names = ("threshold", "sub_block_size", "block_size", "sub_block_cache")
        config = pb.DecodeConfig(max_new_tokens=len(g["output"]), **{n: g[n] for n in names})
        out = pb.generate(golden_model, g["prompt"], config)
        assert out.tokens == [g["output"]]
        assert out.forwards <= g["forwards"]


ADAPTED, PLAIN = small_model(), ar_model()


@settings(max_examples=160)
@given(
    st.sampled_from(list(definitions.DEFINITIONS)),
    st.sampled_from([1, 3, 7, 8, 9, 15, 16, 17, 30]),
    st.sampled_from([{}, {"strategy": "factor"}, {"strategy": "fixed", "tokens_per_step": 2}, {"sub_block_size": 2}]),
    st.sampled_from([{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.7}, {"temperature": 1.2, "top_k": 4}]),
    st.sampled_from([(), (7, 21), (3, 5, 11, 30)]),
    st.integers(1, 24),
)
def test_the_definition_of_each_mode(
    mode: Any, length: int, how: dict[str, Any], sampling: dict[str, Any], stops: tuple[int, ...], new_tokens: int
) -> None:
    model = PLAIN if mode == "speculative" else ADAPTED
    config = replace(BASE, mode=mode, sub_block_cache=False, seed=5, **how, **sampling)
    config = replace(config, stop_token_ids=stops, max_new_tokens=new_tokens)
    ids = prompt(length, length)
    assert pb.generate(model, ids, config).tokens == [definitions.DEFINITIONS[mode](model, ids, config)]


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_does_not_depend_on_its_neighbours(model: Any, mode: Any, cached: bool, temperature: float) -> None:
    config = replace(BASE, mode=mode, sub_block_cache=cached, temperature=temperature, seed=5, stop_token_ids=(7, 21))
    rows = [prompt(40 + n, n) for n in (5, 8, 16, 1, 23, 12)]
    together = pb.generate(model, rows, config)
    assert len({len(t) for t in together.tokens}) > 1  # rows end at different times
    for i in range(len(rows)):
        others = [prompt(90 + i, 3 + 2 * i)] * len(rows)
        others[i] = rows[i]
        alone = pb.generate(model, others, config)
        assert alone.tokens[i] == together.tokens[i]
        assert alone.decode_forwards[i] == together.decode_forwards[i]
        if temperature == 0.0:
            single = pb.generate(model, rows[i], config)
            assert single.tokens == [together.tokens[i]]
            assert single.decode_forwards == [together.decode_forwards[i]]


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_max_new_tokens_is_exact(model: Any, mode: Any) -> None:
    whole = pb.generate(model, prompt(1, 11), replace(BASE, mode=mode, max_new_tokens=30)).tokens[0]
    for n in range(1, 31):
        assert pb.generate(model, prompt(1, 11), replace(BASE, mode=mode, max_new_tokens=n)).tokens[0] == whole[:n]


def test_without_max_new_tokens_the_context_is_the_limit(model: Any) -> None:
    out = pb.generate(model, prompt(1, 240), replace(BASE, max_new_tokens=None))
    assert len(out.tokens[0]) == 16
    with pytest.raises(ValueError, match="a prompt of 256 tokens"):
        pb.generate(model, prompt(1, 256), replace(BASE, max_new_tokens=None))


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("length", [3, 8])
def test_a_stop_token_ends_the_row_wherever_it_stands(model: Any, mode: Any, length: int) -> None:
    config = replace(BASE, mode=mode)
    whole = pb.generate(model, prompt(2, length), config)
    tokens = whole.tokens[0]
    for stop in set(tokens):
        out = pb.generate(model, prompt(2, length), replace(config, stop_token_ids=(stop,)))
        assert out.tokens[0] == tokens[: tokens.index(stop) + 1]
        assert out.forwards <= whole.forwards


def test_a_short_reply_costs_few_forwards(model: Any) -> None:
    tokens = pb.generate(model, prompt(2, 3), BASE).tokens[0]
    first = pb.generate(model, prompt(2, 3), replace(BASE, stop_token_ids=(tokens[0],)))
    assert first.tokens == [[tokens[0]]]
    assert first.forwards < pb.generate(model, prompt(2, 3), replace(BASE, max_new_tokens=D - 3)).forwards


def test_stop_tokens_of_the_prompt_do_not_count(model: Any) -> None:
    ids = [*prompt(3, 9), 62, 61]
    out = pb.generate(model, ids, replace(BASE, stop_token_ids=(62, 61)))
    assert len(out.tokens[0]) >= 1
    assert pb.generate(model, ids, replace(BASE, stop_token_ids=None)).tokens[0]  # the checkpoint's own stop token


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_the_mask_token_is_never_produced(mode: Any) -> None:
    model = small_model()
    with torch.no_grad():  # a model that wants nothing else
        model.lm_head.weight[MASK] = model.lm_head.weight.abs().max() * 50
    for temperature in (0.0, 1.0):
        config = replace(BASE, mode=mode, temperature=temperature, seed=0)
        assert MASK not in pb.generate(model, prompt(4, 10), config).tokens[0]


def test_mask_tokens_in_the_prompt_stay_what_they_are(model: Any) -> None:
    ids = [*prompt(5, 4), MASK, *prompt(6, 5), MASK]
    out = pb.generate(model, ids, replace(BASE, sub_block_cache=False))
    assert len(out.tokens[0]) == BASE.max_new_tokens
    assert out.tokens == [definitions.block_diffusion(model, ids, replace(BASE, sub_block_cache=False))]


def test_a_prompt_of_exactly_one_block_is_seen(model: Any) -> None:
    a, b = prompt(7, D), prompt(8, D)
    assert pb.generate(model, a, BASE).tokens != pb.generate(model, b, BASE).tokens


def test_autoregressive_equals_transformers_generate(model: Any) -> None:
    ids = prompt(9, 13)
    config = replace(BASE, mode="autoregressive", max_new_tokens=20)
    expected = model.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None, suppress_tokens=[MASK],
        pad_token_id=0,
    )  # fmt: skip
    assert pb.generate(model, ids, config).tokens[0] == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_eager_attention_gives_the_same_tokens(model: Any, mode: Any) -> None:
    rows = [prompt(10, 5), prompt(11, 19)]
    other = small_model()
    other.set_attn_implementation("eager")
    config = replace(BASE, mode=mode)
    assert pb.generate(other, rows, config).tokens == pb.generate(model, rows, config).tokens
    assert pb.generate(other, rows[1], config).tokens == pb.generate(model, rows[1], config).tokens


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_sampling_is_repeatable_and_differs_by_row_and_seed(model: Any, mode: Any) -> None:
    config = replace(BASE, mode=mode, temperature=1.0, seed=11)
    rows = [prompt(12, 8)] * 4
    first = pb.generate(model, rows, config).tokens
    assert first == pb.generate(model, rows, config).tokens
    assert len({tuple(t) for t in first}) == 4
    assert len({t[0] for t in pb.generate(model, [prompt(12, 8)] * 32, config).tokens}) > 1  # the first token, too
    assert first != pb.generate(model, rows, replace(config, seed=12)).tokens
    torch.manual_seed(1)
    a = pb.generate(model, rows, replace(config, seed=None)).tokens
    torch.manual_seed(1)
    assert a == pb.generate(model, rows, replace(config, seed=None)).tokens


def test_steps_add_up_to_the_answer(model: Any) -> None:
    rows = [prompt(13, 5), prompt(14, 16)]
    seen: list[dict[int, int]] = [{}, {}]
    last = None
    for step in pb.stream(model, rows, BASE):
        assert not (step.revealed & step.masked).any()
        assert np.isfinite(step.confidence[step.revealed]).all()
        for r, c in zip(*step.revealed.nonzero(), strict=True):
            position = int(step.start[r] + c)
            assert position not in seen[r]  # revealed once
            seen[r][position] = int(step.ids[r, c])
        last = step
    assert last is not None
    out = pb.generate(model, rows, BASE)
    for r, row in enumerate(rows):
        assert last.tokens(r) == out.tokens[r] == [seen[r][len(row) + i] for i in range(BASE.max_new_tokens)]


@pytest.mark.parametrize("cached", [True, False])
def test_one_token_per_step_is_the_slowest_and_threshold_one_equals_it(model: Any, cached: bool) -> None:
    base = replace(BASE, sub_block_cache=cached)
    fixed = pb.generate(model, prompt(15, 6), replace(base, strategy="fixed", tokens_per_step=1))
    sure = pb.generate(model, prompt(15, 6), replace(base, threshold=1.0))
    assert fixed.tokens == sure.tokens
    quick = pb.generate(model, prompt(15, 6), replace(base, threshold=0.0))
    assert quick.forwards < sure.forwards
    pairs = pb.generate(model, prompt(15, 6), replace(base, strategy="fixed", tokens_per_step=2))
    assert quick.forwards < pairs.forwards < fixed.forwards


confidences = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8)


@given(confidences, st.floats(0, 1, width=32), st.floats(0.1, 4), st.integers(1, 8), st.data())
def test_reveal_strategies(values: list[float], threshold: float, factor: float, k: int, data: Any) -> None:
    masked = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    c, m = np.array([values], dtype=np.float32), np.array([masked])
    inside = sorted((v for v, keep in zip(c[0].tolist(), masked, strict=True) if keep), reverse=True)

    by_threshold = reveal(c, m, "threshold", threshold=threshold)
    by_factor = reveal(c, m, "factor", factor=factor)
    fixed = reveal(c, m, "fixed", tokens_per_step=k)
    for chosen in (by_threshold, by_factor, fixed):
        assert not (chosen & ~m).any()
        assert chosen.any() == bool(inside)
        picked = sorted(c[chosen].tolist(), reverse=True)
        assert picked == inside[: len(picked)]  # always the most confident ones
    assert int(by_threshold.sum()) == (max(1, sum(v > threshold for v in inside)) if inside else 0)
    allowed = [n for n, v in enumerate(inside, start=1) if (n + 1) * (1 - v) < factor]
    if abs(min([(n + 1) * (1 - v) - factor for n, v in enumerate(inside, 1)], key=abs, default=1)) > 1e-5:
        assert int(by_factor.sum()) == (max([1, *allowed]) if inside else 0)
    assert int(fixed.sum()) == min(k, len(inside))


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 3), st.booleans())
def test_theorem_1_parallel_greedy_equals_sequential_greedy(seed: int, n: int, V: int, tight: bool) -> None:
    """Fast-dLLM, theorem 1: with every marginal above 1 - eps and (n + 1) eps <= 1, the joint argmax, the parallel
    choice and every sequential order agree."""
    rng = np.random.default_rng(seed)
    eps = 1 / (n + 1)
    target = tuple(rng.integers(0, V, n))
    joint = rng.dirichlet(np.full(V**n, 0.3)).reshape((V,) * n)
    # mix with a point mass until every marginal confidence exceeds 1 - eps, no further than needed if `tight`
    marginal = min(joint.sum(axis=tuple(a for a in range(n) if a != i))[target[i]] for i in range(n))
    weight = max(0.0, 1 - (eps * (0.999 if tight else rng.uniform(0.1, 0.9))) / max(1e-12, 1 - marginal))
    joint = joint * (1 - weight)
    joint[target] += weight
    marginals = [joint.sum(axis=tuple(a for a in range(n) if a != i)) for i in range(n)]
    assert min(m[t] for m, t in zip(marginals, target, strict=True)) > 1 - eps
    parallel = tuple(int(m.argmax()) for m in marginals)
    assert parallel == target
    for order in itertools.permutations(range(n)):
        rest = joint
        chosen: dict[int, int] = {}
        for axis in order:
            left = [a for a in range(n) if a not in chosen]
            conditional = rest.sum(axis=tuple(i for i, a in enumerate(left) if a != axis))
            chosen[axis] = int(conditional.argmax())
            rest = rest.take(chosen[axis], axis=left.index(axis))
        assert tuple(chosen[i] for i in range(n)) == parallel


def test_theorem_1_needs_its_condition() -> None:
    """Two tokens, eps = 0.45 with (n + 1) eps > 1: both marginals exceed 0.55 and yet the orders disagree."""
    joint = np.array([[0.16, 0.42], [0.42, 0.0]])
    assert joint.sum(1)[0] > 0.55
    assert joint.sum(0)[0] > 0.55
    parallel = (int(joint.sum(1).argmax()), int(joint.sum(0).argmax()))
    sequential = (int(joint.sum(1).argmax()), int(joint[joint.sum(1).argmax()].argmax()))
    assert parallel == (0, 0)
    assert sequential == (0, 1)
    assert joint[parallel] < joint[sequential]


def test_top_p_and_temperature_follow_the_definition() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]])
    n = 20000
    u = uniform(3, torch.arange(n)[:, None], torch.zeros(n, 1, dtype=torch.long), torch.zeros(n, 1, dtype=torch.long))
    assert 0 <= u.min() <= u.max() < 1
    tokens, confidence = propose(logits.expand(n, 1, 4), u, temperature=0.7, top_p=0.9)
    p = (logits[0, 0] / 0.7).softmax(-1)
    kept = p * torch.tensor([1, 1, 0, 0])  # 0.76 alone is below 0.9, with the second it is above
    kept = kept / kept.sum()
    share = torch.bincount(tokens[:, 0], minlength=4) / n
    assert (share - kept).abs().max() < 0.015
    torch.testing.assert_close(confidence[:, 0], kept[tokens[:, 0]])


BAD_CONFIGS = [
    ({"threshold": 1.5}, "threshold=1.5"),
    ({"threshold": -0.1}, "threshold=-0.1"),
    ({"mode": "fast"}, "mode='fast'"),
    ({"strategy": "all"}, "strategy='all'"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"sub_block_size": 5, "block_size": 32}, "sub_block_size=5"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": 1e-40}, "temperature=1e-40"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"top_p": 1e-300}, "top_p=1e-300"),
    ({"factor": 0.0}, "factor=0.0"),
    ({"tokens_per_step": 0}, "tokens_per_step=0"),
    ({"seed": 2**70}, "seed=1180591620717411303424"),
    ({"mode": "speculative", "draft_tokens": 0}, "draft_tokens=0"),
    ({"mode": "speculative", "drafter": "oracle"}, "drafter='oracle' is out of range; use 'masks', 'lookup' or 'both'"),
    ({"mode": "diffusion", "draft_tokens": 3}, "draft_tokens=3 belongs to mode='speculative', and mode is 'diffusion'"),
    ({"mode": "autoregressive", "drafter": "lookup"}, "drafter='lookup' belongs to mode='speculative'"),
]


@pytest.mark.parametrize(("values", "message"), BAD_CONFIGS)
def test_bad_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.DecodeConfig(**values)


def test_bad_requests_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        pb.generate(model, [[1], []], BASE)
    with pytest.raises(ValueError, match="no prompt"):
        pb.generate(model, [], BASE)
    with pytest.raises(ValueError, match=r"prompt of 250 tokens .* context of 256"):
        pb.stream(model, prompt(0, 250), BASE)  # at once, not at the first step
    with pytest.raises(ValueError, match=r"sub_block_size=3 .* block size 8"):
        pb.generate(model, [1], replace(BASE, sub_block_size=3))
    with pytest.raises(ValueError, match="outside the vocabulary of 64"):
        pb.generate(model, [64], BASE)
    with pytest.raises(ValueError, match="layers of type chunked_attention"):
        pb.generate(small_model(layer_types=["full_attention", "chunked_attention"]), [1], BASE)
    plain = small_model()
    del plain.config.mask_token_id
    with pytest.raises(ValueError, match="mode='diffusion': the checkpoint names no mask token"):
        pb.generate(plain, [1], replace(BASE, mode="diffusion"))
    assert pb.generate(plain, [1], replace(BASE, mask_token_id=MASK)).tokens
    ar = pb.generate(plain, [1], replace(BASE, mode="autoregressive")).tokens
    assert pb.generate(plain, [1], BASE).tokens == ar  # a model that was never adapted has no other mode
    del plain.config.bd_size
    with pytest.raises(ValueError, match="names no block size, it was never adapted"):
        pb.generate(plain, [1], replace(BASE, mode="diffusion", mask_token_id=MASK))
    with pytest.raises(TypeError, match="speed"):
        pb.DecodeConfig(speed=3)  # type: ignore[call-arg]
