"""Layers that see a window of what stands before a token: in every executor, loss and likelihood as by definition."""

from dataclasses import replace
from typing import Any

import definitions
import numpy as np
import pytest
import torch
from cases import BASE, ENDLESS, MASK, MODES, ROWS, D, empty, prompt
from conftest import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from official_layout import masks_of, official_loss
from test_diffusion import packed_and_apart, random_batch
from test_engine import plain_varlen_attn
from torch.nn.attention.flex_attention import flex_attention
from transformers import Gemma2Config, Gemma2ForCausalLM

import parablock as pb
from parablock.decoding.generate import resolve
from parablock.diffusion.masks import block_causal_mask, block_layout
from parablock.diffusion.noise import complementary_views
from parablock.diffusion.objective import autoregressive_loss, hidden_states
from parablock.diffusion.support import layer_windows
from parablock.engine.groups import look
from parablock.engine.schedule import Group
from parablock.evals.likelihood import _Blocks, log_likelihood

WINDOWS = (3, 8, 13)  # less than a block, one, and more
DEFINITIONS = {"diffusion": definitions.block_diffusion, "autoregressive": definitions.autoregressive}


def windowed(window: int, full_layers: int = 1) -> Any:
    """The small model, whose last layers have a window."""
    return small_model(use_sliding_window=True, sliding_window=window, max_window_layers=full_layers)


def capped(**changes: Any) -> Any:
    """A random Gemma 2: every other layer has a window, and its scores are squeezed."""
    torch.manual_seed(0)
    config = Gemma2Config(
        **{
            "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
            "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256, "sliding_window": 13,
            "initializer_range": 0.35, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "eos_token_id": 62,
            "bos_token_id": None, "pad_token_id": 0, **changes,
        }
    )  # fmt: skip
    config.bd_size, config.mask_token_id = D, MASK
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()


MODELS = {**{f"window {w}": (windowed, w) for w in WINDOWS}, "capped": (capped,)}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    make, *arguments = MODELS[request.param]
    return make(*arguments)


@pytest.mark.parametrize("mode", MODES)
def test_every_executor_equals_the_definition(model: Any, mode: Any) -> None:
    config = replace(BASE, mode=mode, sub_block_cache=False, temperature=0.7)
    some = [ROWS[i] for i in (0, 3, 6, 7)]
    expected = [DEFINITIONS[mode](model, row, config) for row in some]
    assert [pb.generate(model, row, config).tokens[0] for row in some] == expected
    *_, last = pb.stream(model, some[2], config)
    assert last.tokens() == expected[2]
    batch = pb.generate(model, ROWS, config).tokens
    for chunk, rows in ((8, 1), (16, 3), (256, 16)):
        with pb.Engine(model, pb.EngineConfig(prefill_chunk=chunk, max_rows=rows)) as engine:
            for _ in range(2):  # the second time their beginnings are known
                assert engine.generate(ROWS, config).tokens == batch
            assert empty(engine)
    if mode == "diffusion":
        # transformers draws from no seed of ours: greedy
        greedy = replace(config, temperature=0.0)
        fields = {"sub_block_size": 4, "threshold": 0.5, "sub_block_cache": False, "eos_token_id": [7, 21]}
        out = model.generate(
            torch.tensor([ROWS[5]]), custom_generate=pb.custom_generate, do_sample=False, max_new_tokens=24, **fields
        )
        assert out[0, len(ROWS[5]) :].tolist() == definitions.block_diffusion(model, ROWS[5], greedy)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_window_decides(window: int) -> None:
    """Else the tests above would test nothing; and one that is longer than the context hides nothing."""
    expected = pb.generate(small_model(), ROWS, BASE).tokens
    assert pb.generate(windowed(window), ROWS, BASE).tokens != expected
    unbounded = windowed(256)
    assert layer_windows(unbounded.config) == (0, 0)
    assert pb.generate(unbounded, ROWS, BASE).tokens == expected


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("full_layers", [0, 1])
def test_ar_mode_is_transformers_own_generation(window: int, full_layers: int) -> None:
    model = windowed(window, full_layers)
    config = replace(ENDLESS, mode="autoregressive", max_new_tokens=30)
    for ids in (ROWS[0], ROWS[6]):
        rows = torch.tensor([ids])
        expected = model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=30, do_sample=False, eos_token_id=None,
            suppress_tokens=[MASK], pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
        assert pb.generate(model, ids, config).tokens == [expected]
        with pb.Engine(model) as engine:
            assert engine.generate(ids, config).tokens == [expected]


@pytest.mark.parametrize("mode", MODES)
def test_the_sub_block_cache_and_pages_that_are_given_back(model: Any, mode: Any) -> None:
    config = replace(ENDLESS, mode=mode, max_new_tokens=40)
    rows = [prompt(i, n) for i, n in enumerate((5, 8, 16, 17))]
    expected = pb.generate(model, rows, config)
    with pb.Engine(model, pb.EngineConfig(max_rows=4, kv_tokens=9 * D, max_context=64)) as engine:
        assert engine.generate(rows, config).tokens == expected.tokens
        assert engine.preemptions > 1


@pytest.mark.parametrize("mode", MODES)
def test_layers_with_a_window_gather_where_others_read_in_place(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, calls = windowed(8), replace(BASE, mode=mode), []

    def in_place(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["seqused_k"].max())
        return plain_varlen_attn(*args, **kwargs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", in_place)  # needs CUDA
    with pb.Engine(model, pb.EngineConfig(max_rows=5)) as engine:
        engine.runner._paged = True
        assert engine.generate(ROWS, config).tokens == pb.generate(model, ROWS, config).tokens
    assert max(calls) > 8  # the layer without a window


GROUPS = st.tuples(
    st.integers(1, 5).flatmap(  # rows
        lambda n: st.tuples(*(st.lists(st.integers(0, 9), min_size=n, max_size=n) for _ in range(2)))
    ),
    st.sampled_from([1, 2, 4, 8, 16]),  # width
    st.sampled_from([1, 4]),  # grain
    st.integers(0, 40),  # window
    st.booleans(),
)


@settings(max_examples=200)
@given(GROUPS)
def test_a_group_looks_at_what_its_queries_see_and_at_little_more(drawn: Any) -> None:
    (blocks, offsets), W, grain, window, in_place = drawn
    size, n = 4, len(blocks)
    first_n = np.array([4 * b + (o % 4 if W <= 2 else 0) for b, o in zip(blocks, offsets, strict=True)])
    if grain == 4 and W <= 2:
        first_n = first_n // W * W  # a piece of one block
    table = np.random.default_rng(0).permutation(np.arange(1, 16 * n + 1)).reshape(n, 16)
    pages = int((first_n + W - 1).max()) // size + 1
    group = Group(np.arange(n), first_n, np.full(n, grain), W, pages)
    shape, (looked, limit, low, _) = look(group, table, size, window, in_place=in_place)
    if window:
        assert shape.pages <= -(-(window + W - 1) // size) + 1
    for row in range(n):
        # (page, place) of every slot it looks at; what its queries see of these
        slots = [(page, place) for page in looked[row] for place in range(size)]
        for query in range(W):
            position = int(first_n[row]) + query
            above = limit[row, min(query, shape.limits - 1)]
            below = low[row, query] if shape.lows else 0
            seen = {slot for i, slot in enumerate(slots) if below <= i < above}
            ends = (position // grain + 1) * grain
            keys = [k for k in range(ends) if not window or position - k < window]
            assert seen == {(table[row, k // size], k % size) for k in keys}


def plain_flex(query: Any, key: Any, value: Any, training: bool = False, **kwargs: Any) -> Any:
    return flex_attention(query, key, value, **kwargs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rows", [1, 2])
def test_losses_equal_the_published_layout(model: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, labels, noise = random_batch(3, rows, 4, D, 0.7)
    fields = {"block_size": D, "mask_token_id": MASK}
    expected = official_loss(model, ids, labels, noise, **fields)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for attention in ("block", "dense"):
        model.zero_grad()
        loss = pb.diffusion_loss(model, ids, labels, noise, **fields, attention=attention)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for p, g in zip(model.parameters(), gradients, strict=True):
            assert (p.grad - g).norm() <= 1e-4 * g.norm() + 1e-8
    model.zero_grad()
    flex = "transformers.integrations.flex_attention.compile_friendly_flex_attention"
    monkeypatch.setattr(flex, plain_flex)  # compiled, it is for GPUs
    with torch.no_grad():
        loss = pb.diffusion_loss(model, ids, labels, noise, **fields, attention="flex")
    torch.testing.assert_close(loss, expected)


def test_isolated_samples_learn_as_if_alone(model: Any) -> None:
    row, parts = packed_and_apart(11, [3, 1, 4], D)
    with torch.no_grad():
        for attention in ("block", "dense"):
            fields = {"block_size": D, "mask_token_id": MASK, "num_items": 1, "attention": attention}
            apart = sum(pb.diffusion_loss(model, *part, **fields) for part in parts)
            torch.testing.assert_close(pb.diffusion_loss(model, **row, **fields), apart)
        together = autoregressive_loss(
            model, row["input_ids"], row["labels"], samples=row["samples"], block_size=D, num_items=1
        )
        apart = sum(autoregressive_loss(model, p[0], p[1], block_size=D, num_items=1) for p in parts)
        torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("window", WINDOWS)
def test_flex_masks_equal_the_dense_masks(window: int) -> None:
    _, labels, noise = random_batch(8, 3, 4, D, 0.4)
    layout = block_layout(*complementary_views(noise, labels), D)
    tree, _ = tree_of(windowed(window))
    for units in (layout, tree):
        T = units.positions().shape[1]
        q, k = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
        seen = units.flex_mask(window).mask_mod(torch.tensor(0), torch.tensor(0), q, k)
        assert torch.equal(seen, units.dense_mask(window)[0, 0])
        assert not torch.equal(seen, units.dense_mask()[0, 0])


def tree_of(model: Any) -> Any:
    blocks = _Blocks(resolve(model, [[0]], pb.DecodeConfig(max_new_tokens=1)))
    for text in ([*range(33)], [*range(19), 30, 31], [5, 6, 7]):
        for position in range(1, len(text)):
            blocks.source(text, position)
    return blocks._tree(torch.device("cpu"))


@torch.no_grad()
def test_likelihood_is_the_chain_rule(model: Any) -> None:
    tree, _ = tree_of(model)
    by_structure, dense = (hidden_states(model, tree.ids, tree, attention=kind) for kind in ("block", "dense"))
    torch.testing.assert_close(by_structure, dense, rtol=1e-4, atol=1e-4)
    pairs = [(ROWS[6][:21], ROWS[6][21:]), (ROWS[7], ROWS[0]), (ROWS[6][:21], [1, 2])]
    for mode in MODES:
        config = resolve(model, [[0]], pb.DecodeConfig(mode=mode, max_new_tokens=1))
        for (context, continuation), (value, _) in zip(pairs, log_likelihood(model, pairs, config), strict=True):
            text, expected = [*context, *continuation], 0.0
            for i in range(len(context), len(text)):
                known = text[:i] + ([] if i % D == 0 or mode == "autoregressive" else [MASK] * (D - i % D))
                positions = torch.arange(len(known))
                mask = masks_of(model, block_causal_mask(len(known), D if mode == "diffusion" else 1), positions)
                logits = model(torch.tensor([known]), attention_mask=mask, position_ids=positions[None]).logits[
                    0, i - 1
                ]
                logits[MASK] = -torch.inf
                expected += logits.log_softmax(-1)[text[i]].item()
            assert value == pytest.approx(expected, rel=1e-4)


def test_capped_scores_beside_an_engine() -> None:
    """While an engine uses the model, others still get what it computes by itself."""
    model = capped()
    ids = torch.tensor([ROWS[6]])
    for sampled in ({"do_sample": False}, {"do_sample": False, "use_cache": False}):
        expected = model.generate(ids, max_new_tokens=12, **sampled)
        with pb.Engine(model) as engine:
            assert torch.equal(model.generate(ids, max_new_tokens=12, **sampled), expected)
            assert pb.generate(model, ROWS, BASE).tokens == engine.generate(ROWS, BASE).tokens
            row, _ = packed_and_apart(11, [3, 1, 4], D)
            del row["noise_mask"]
            during = autoregressive_loss(model, **row, block_size=D)
        torch.testing.assert_close(during, autoregressive_loss(model, **row, block_size=D))
    expected_tokens = pb.generate(model, ROWS, BASE).tokens
    assert pb.generate(capped(attn_logit_softcapping=None), ROWS, BASE).tokens != expected_tokens
    model.config._attn_implementation = "sdpa"  # as some releases of transformers load it
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=2.0 .*set_attn_implementation\('eager'\)"):
        pb.generate(model, ROWS, BASE)
