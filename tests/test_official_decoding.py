"""The published loop that the benchmark measures against: its tokens, its forwards, its habits, and the comparison."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import small_model
from official import HABITS, PUBLISHED, UNCACHED, contenders, decisive, measure, must_agree
from official_decoding import Way, decode

import parablock as pb

WAYS = [Way(*flags) for flags in itertools.product((False, True), repeat=3)]
CONFIG = pb.DecodeConfig(max_new_tokens=21, sub_block_size=4, threshold=0.3, stop_token_ids=tuple(range(0, 60, 7)))


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 60, (length,), generator=generator).tolist() for length in lengths]


def test_the_recorded_answers_in_as_many_forwards(golden_model: Any, golden_generations: list[dict[str, Any]]) -> None:
    for g in golden_generations:
        settings = {name: g[name] for name in ("threshold", "sub_block_size", "sub_block_cache")}
        config = pb.DecodeConfig(max_new_tokens=len(g["output"]), stop_token_ids=(510,), **settings)
        out = decode(golden_model, [g["prompt"]], config, Way(stop_at_once=True))
        assert out.tokens == [g["output"]]
        assert out.forwards == g["forwards"]


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_those_of_generate(way: Way) -> None:
    model = small_model()
    prompts = prompts_of(5, 7, 13, 16, 20, 24, 33)  # before, on and behind the ends of blocks
    for cached in (False, True):
        config = replace(CONFIG, sub_block_cache=cached)
        expected = pb.generate(model, prompts, config).tokens
        assert len({len(tokens) for tokens in expected}) > 1  # some stop
        assert [decode(model, [prompt], config, way).tokens[0] for prompt in prompts] == expected
        if not cached:
            assert decode(model, prompts, config, way).tokens == expected


def watched(run: Callable[[Any], Any]) -> list[tuple[int, int, bool]]:
    """Of every forward: its tokens, the positions of its head, and whether it has a mask."""
    model, seen = small_model(), []
    model.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(
            (kwargs["input_ids"].shape[1], out.logits.shape[1], kwargs["attention_mask"] is not None)
        ),
        with_kwargs=True,
    )
    run(model)
    return seen


def test_each_habit_can_be_given_up() -> None:
    (prompt,), config = prompts_of(20), replace(CONFIG, max_new_tokens=9, stop_token_ids=(), sub_block_cache=False)

    def calls(cached: bool, **habits: bool) -> list[tuple[int, int, bool]]:
        return watched(lambda model: decode(model, [prompt], replace(config, sub_block_cache=cached), Way(**habits)))

    published = calls(False)
    assert published[0] == (16, 16, True)
    assert set(published[1:]) == {(8, 8, True)}
    assert len(calls(False, stop_at_once=True)) < len(published)  # the answer ends five tokens into a block
    assert {head for _, head, _ in calls(False, head_everywhere=False)} == {1, 4}
    assert [mask for _, _, mask in calls(False, concatenate=False)] == [True] + [False] * (len(published) - 1)
    assert {(width, mask) for width, _, mask in calls(True)[1:]} == {(8, True), (4, False)}


def test_a_batch_loses_the_rows_that_have_ended() -> None:
    model, rows = small_model(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    for way in (Way(), Way(concatenate=False)):
        rows.clear()
        out = decode(model, prompts_of(9, 12, 40), CONFIG, way)
        assert rows[0] == 3
        assert rows[-1] < 3
        assert len(rows) == out.forwards > max(out.decode_forwards) > min(out.decode_forwards)


def test_the_comparison_times_equal_answers_alone() -> None:
    model, prompts = small_model(), prompts_of(9, 12, 20)
    with pb.Engine(model, pb.EngineConfig(max_rows=3, max_context=64)) as engine:
        runs = contenders(model, model, engine, engine)
        found = measure(runs, [[prompt] for prompt in prompts], CONFIG, 1, 3)
        assert list(found) == list(runs)
        assert found[PUBLISHED]["over_published"]["median"] == 1
        assert found[PUBLISHED]["forwards"] > found[UNCACHED]["forwards"]
        assert {name: of["tokens_per_answer"] for name, of in found.items() if not runs[name][0]} == {
            PUBLISHED: found[UNCACHED]["tokens_per_answer"],
            UNCACHED: found[PUBLISHED]["tokens_per_answer"],
        }
        wrong = pb.generate(model, prompts[::-1], CONFIG)
        runs["engine"] = (True, lambda *_: wrong)
        with pytest.raises(SystemExit, match=r"^engine decodes other tokens than pb\.generate"):
            measure(runs, [prompts], CONFIG, 1, 3)


def test_who_must_agree() -> None:
    alone, together = ([must_agree(name, requests) for name in HABITS] for requests in (1, 8))
    assert len(set(alone)) == 2
    assert len(set(together)) == len(HABITS)
    assert must_agree("pb.generate", 8) == must_agree("engine", 8) == alone[1]


def test_decisive_weights_reveal_several_tokens() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=512, tie_word_embeddings=True)).eval()
    model.config.bd_size, model.config.mask_token_id = 32, 511
    config = pb.DecodeConfig(max_new_tokens=40, stop_token_ids=())
    assert pb.generate(model, prompts_of(45), config).tokens_per_forward < 1.1
    assert pb.generate(decisive(model), prompts_of(45), config).tokens_per_forward > 1.5
