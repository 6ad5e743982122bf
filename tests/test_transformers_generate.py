"""`model.generate` of transformers with block diffusion behind it: arguments, padding, streamers."""

import itertools
from typing import Any

import pytest
import torch
from conftest import small_model
from transformers import TextDiffusionStreamer, TextStreamer

import parablock as pb

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
FIELDS: dict[str, Any] = {"sub_block_size": 4, "threshold": 0.5}


def generate(model: Any, ids: Any = None, **kwargs: Any) -> Any:
    ids = torch.tensor([PROMPT]) if ids is None else ids
    kwargs = {"max_new_tokens": 20, "do_sample": False, **FIELDS, **kwargs}
    return model.generate(ids, custom_generate=pb.custom_generate, **kwargs)


def test_same_tokens_as_generate(model: Any) -> None:
    expected = pb.generate(model, PROMPT, pb.DecodeConfig(max_new_tokens=20, **FIELDS)).tokens[0]
    assert generate(model)[0].tolist() == PROMPT + expected
    assert generate(model, return_dict_in_generate=True).sequences[0].tolist() == PROMPT + expected
    stop = expected[10]
    cut = generate(model, eos_token_id=stop)[0, len(PROMPT) :].tolist()
    assert cut == expected[: expected.index(stop) + 1]
    for fields in ({"strategy": "factor", "factor": 2.0}, {"strategy": "fixed", "tokens_per_step": 3}):
        config = pb.DecodeConfig(max_new_tokens=20, sub_block_size=4, sub_block_cache=False, **fields)
        tokens = generate(model, sub_block_cache=False, **fields)[0, len(PROMPT) :].tolist()
        assert tokens == pb.generate(model, PROMPT, config).tokens[0]


def test_sampling_comes_from_transformers_arguments(model: Any) -> None:
    config = pb.DecodeConfig(max_new_tokens=20, temperature=0.7, top_p=0.8, top_k=5, seed=11, **FIELDS)
    tokens = generate(model, do_sample=True, temperature=0.7, top_p=0.8, top_k=5, seed=11)[0, len(PROMPT) :].tolist()
    assert tokens == pb.generate(model, PROMPT, config).tokens[0]


def test_left_padded_batches(model: Any) -> None:
    rows = [PROMPT, PROMPT[:3]]
    alone = pb.generate(model, rows, pb.DecodeConfig(max_new_tokens=20, **FIELDS)).tokens
    batch = torch.tensor([PROMPT, [0] * 7 + PROMPT[:3]])
    mask = torch.tensor([[1] * 10, [0] * 7 + [1] * 3])
    both = generate(model, batch, attention_mask=mask, pad_token_id=0)
    for row, answer in zip(both[:, 10:].tolist(), alone, strict=True):
        assert row == answer + [0] * (len(row) - len(answer))


def test_num_return_sequences_are_drawn_apart(model: Any) -> None:
    out = generate(model, do_sample=True, num_return_sequences=3, seed=1)
    assert out.shape[0] == 3
    assert len({tuple(row) for row in out.tolist()}) == 3


class Recorder:
    """A streamer by contract: what is put, what is drafted, and that it ends once."""

    def __init__(self) -> None:
        self.put_ids: list[list[int]] = []
        self.drafts: list[tuple[int, list[int]]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.put_ids.append(value.flatten().tolist())

    def put_draft(self, value: torch.Tensor) -> None:
        self.drafts.append((sum(map(len, self.put_ids)), value.tolist()))

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("seed", range(3))
def test_a_streamer_gets_the_prompt_then_settled_tokens_and_drafts(seed: int) -> None:
    model = small_model(seed=seed)
    streamer = Recorder()
    whole = generate(model, streamer=streamer)[0].tolist()
    assert streamer.ended == 1
    assert streamer.put_ids[0] == PROMPT
    assert list(itertools.chain(*streamer.put_ids)) == whole
    assert streamer.drafts
    mask = model.config.mask_token_id
    for start, draft in streamer.drafts:
        assert draft[0] == mask  # what stands before the first mask is not a draft
        for token, final in zip(draft, whole[start:], strict=False):
            assert token in (mask, final)  # a revealed token stays


def test_transformers_own_streamers(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = pb.load("bundled")
    ids = torch.tensor([tokenizer("Mara has 4 boxes with 6 pencils in each.")["input_ids"]])
    plain = generate(model, ids, sub_block_size=8)
    text = tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True).strip()
    for kind in (TextStreamer, TextDiffusionStreamer):
        capsys.readouterr()
        streamer = kind(tokenizer, skip_prompt=True, skip_special_tokens=True)
        out = generate(model, ids, sub_block_size=8, streamer=streamer)
        shown = capsys.readouterr().out
        assert torch.equal(out, plain)
        if kind is TextStreamer:
            assert shown.strip() == text
        else:
            assert "\033[33m" in shown  # drafts are yellow
    with pytest.raises(ValueError, match="a streamer shows one row"):
        generate(model, ids.repeat(2, 1), streamer=Recorder())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 3}, "num_beams=3"),
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper"),
        ({"max_time": 3.0}, "MaxTimeCriteria"),
        ({"threshold": 2.0}, "threshold=2.0"),
        ({"thresold": 0.5}, "thresold"),
        ({"sub_block_size": 3}, "sub_block_size=3"),
    ],
)
def test_what_cannot_be_honoured_is_refused(model: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **wrong)


def test_the_checkpoints_own_penalty_is_left_out_with_a_warning() -> None:
    model = small_model()
    plain = generate(model)
    model.generation_config.repetition_penalty = 1.05  # as Qwen's generation_config.json
    with pytest.warns(UserWarning, match=r"repetition_penalty=1\.05 of the checkpoint"):
        assert torch.equal(generate(model), plain)


def test_a_block_size_that_is_not_the_checkpoints_own_is_warned_of(model: Any) -> None:
    with pytest.warns(UserWarning, match=r"block_size=4, but the checkpoint was trained with 8.*table 4"):
        generate(model, block_size=4)
