"""Evaluation: likelihoods against brute force, the harness, its tasks and files, comparisons."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import parablock as pb
from parablock.decoding.generate import resolve
from parablock.diffusion.masks import block_causal_mask
from parablock.diffusion.objective import hidden_states
from parablock.evals.likelihood import _Blocks, log_likelihood

VOCABULARY = 40
pytestmark = pytest.mark.filterwarnings("ignore:block_size=")


@pytest.fixture(scope="module")
def tiny() -> Any:
    """A random decoder with block size 4 and mask token 39."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    config.bd_size, config.mask_token_id = 4, VOCABULARY - 1
    return Qwen2ForCausalLM(config).eval()


def _config(model: Any, **settings: Any) -> pb.DecodeConfig:
    sub = settings.pop("sub_block_size", 1)
    return resolve(model, [[0]], pb.DecodeConfig(max_new_tokens=1, sub_block_size=sub, **settings))


def _by_hand(model: Any, text: list[int], first: int, size: int) -> tuple[float, bool]:
    """The chain rule, one forward per token over the whole sequence with the later positions of its block masked."""
    total, greedy = 0.0, True
    for i in range(first, len(text)):
        known = text[:i] if i % size == 0 else text[:i] + [VOCABULARY - 1] * (size - i % size)
        mask = block_causal_mask(len(known), size)
        additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None]
        with torch.no_grad():
            logits = model(torch.tensor([known]), attention_mask=additive).logits[0, i - 1]
        logits[VOCABULARY - 1] = -torch.inf
        total += float(torch.log_softmax(logits, -1)[text[i]])
        greedy &= int(logits.argmax()) == text[i]
    return total, greedy


tokens = st.lists(st.integers(0, VOCABULARY - 2), min_size=1, max_size=11)


@settings(max_examples=30, deadline=None)
@given(
    pairs=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=4),
    size=st.sampled_from([1, 2, 4, 8]),
    limit=st.sampled_from([1, 24, 8192]),
)
def test_likelihood_is_the_chain_rule(tiny: Any, pairs: list[Any], size: int, limit: int) -> None:
    pairs = [*pairs, pairs[0], (pairs[0][0], [*pairs[0][1], 3])]  # shared beginnings
    config = _config(tiny, block_size=size)
    for (context, continuation), (value, greedy) in zip(
        pairs, log_likelihood(tiny, pairs, config, max_tokens=limit), strict=True
    ):
        expected, best = _by_hand(tiny, [*context, *continuation], len(context), size)
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert greedy == best


@settings(max_examples=20, deadline=None)
@given(pairs=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5))
def test_blocks_of_one_token_are_the_causal_model(tiny: Any, pairs: list[Any]) -> None:
    ar = log_likelihood(tiny, pairs, _config(tiny, mode="autoregressive"))
    ones = log_likelihood(tiny, pairs, _config(tiny, block_size=1))
    for (context, continuation), one, (value, greedy) in zip(pairs, ones, ar, strict=True):
        with torch.no_grad():
            logits = tiny(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
        logits[:, VOCABULARY - 1] = -torch.inf
        expected = torch.log_softmax(logits, -1)[range(len(continuation)), continuation].sum()
        assert value == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
        assert one == (pytest.approx(value, rel=1e-4, abs=1e-4), greedy)


def test_answers_to_one_question_share_its_forward(tiny: Any) -> None:
    calls = []
    hook = tiny.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    context = list(range(10))
    try:
        log_likelihood(tiny, [(context, [answer]) for answer in (11, 12, 13, 14)], _config(tiny))
    finally:
        hook.remove()
    assert len(calls) == 1
    blocks = _Blocks(_config(tiny))
    assert len({blocks.source([*context, answer], 10) for answer in (11, 12, 13, 14)}) == 1
    assert blocks.tokens == 12  # two clean blocks and the one that is written


def test_the_mask_token_has_no_probability(tiny: Any) -> None:
    (value, greedy) = log_likelihood(tiny, [([1, 2], [VOCABULARY - 1])], _config(tiny))[0]
    assert value == -torch.inf
    assert not greedy
    every = log_likelihood(tiny, [([1, 2], [token]) for token in range(VOCABULARY - 1)], _config(tiny))
    assert sum(torch.tensor([v for v, _ in every]).exp()).item() == pytest.approx(1, abs=1e-4)


def test_the_tree_means_the_same_to_every_attention(tiny: Any) -> None:
    blocks = _Blocks(_config(tiny))
    for text in ([*range(13)], [*range(9), 30, 31], [5, 6, 7]):
        for position in range(1, len(text)):
            blocks.source(text, position)
    tree, _ = blocks._tree(torch.device("cpu"))
    with torch.no_grad():
        by_structure, dense = (hidden_states(tiny, tree.ids, tree, attention=kind) for kind in ("block", "dense"))
    torch.testing.assert_close(by_structure, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_nothing_to_predict_is_refused(tiny: Any, pair: Any) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        log_likelihood(tiny, [pair], _config(tiny))
