"""What a watcher sees of speculative decoding: drafts that wait, drafts that were refused, and settled text alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BASE, ROWS
from conftest import ar_model, attach_gate

import parablock as pb

CONFIG = replace(BASE, mode="speculative", draft_tokens=4, max_new_tokens=40, stop_token_ids=())


@pytest.fixture(scope="module")
def gated() -> Any:
    return attach_gate(ar_model())


def settings_of(drafter: Any) -> pb.DecodeConfig:
    return replace(CONFIG, drafter=drafter)


@pytest.mark.parametrize("drafter", ["masks", "lookup", "both"])
def test_every_draft_is_accepted_or_refused(gated: Any, drafter: Any) -> None:
    """Of a row, the drafts that waited before a step are the ones it runs, if masks alone draft."""
    expected = pb.generate(gated, ROWS, settings_of(drafter))
    waiting: list[list[int]] = [[] for _ in ROWS]
    before, refused_in_all = [0] * len(ROWS), [0] * len(ROWS)
    for step in pb.stream(gated, ROWS, settings_of(drafter)):
        for row, answer in enumerate(expected.tokens):
            settled = step.tokens(row)
            assert settled == answer[: len(settled)]  # nothing of a draft is ever settled
            new = settled[before[row] :]
            refused = step.refused[row][step.refused[row] >= 0].tolist()
            if refused:
                assert refused[0] != new[-1]  # the model's own token stands in its place
            if drafter == "masks" and new:
                assert [*new[:-1], *refused] == waiting[row][: len(new) - 1 + len(refused)]
            waiting[row] = step.draft(row).tolist()
            before[row] = len(settled)
            refused_in_all[row] += len(refused)
    assert refused_in_all == [d - a for d, a in zip(expected.drafted, expected.accepted, strict=True)]
    assert expected.drafted_by == {n: sum(expected.drafted) if n == drafter else expected.drafted_by[n] for n in
                                   ("masks", "lookup")}  # fmt: skip
    assert sum(expected.accepted_by.values()) == sum(expected.accepted) > 0


def test_drafts_of_a_step_stay_as_they_were(gated: Any) -> None:
    steps = list(pb.stream(gated, ROWS[:3], settings_of("masks")))
    assert any(len(step.draft(0)) for step in steps)
    assert not len(steps[-1].draft(0))  # nothing waits behind the end
    for step, again in zip(steps, pb.stream(gated, ROWS[:3], settings_of("masks")), strict=True):
        assert [step.draft(row).tolist() for row in range(3)] == [again.draft(row).tolist() for row in range(3)]


@pytest.mark.parametrize("drafter", ["masks", "both"])
def test_the_engines_updates_show_the_same(gated: Any, drafter: Any) -> None:
    prompt = ROWS[0]
    steps = [
        (step.draft(0).tolist(), step.refused[0][step.refused[0] >= 0].tolist(), step.tokens())
        for step in pb.stream(gated, prompt, settings_of(drafter))
    ]
    whole = pb.generate(gated, prompt, settings_of(drafter))
    with pb.Engine(gated, pb.EngineConfig(max_rows=2)) as engine:
        handle = engine.submit(pb.Request(prompt, settings_of(drafter), stream=True))
        other = engine.submit(pb.Request(ROWS[1], replace(BASE, mode="autoregressive"), stream=True))
        seen, tokens = [], []
        for update in handle.updates():
            tokens += update.tokens
            seen.append((*(ids[ids >= 0].tolist() for ids in (update.drafts, update.refused)), [*tokens]))
        assert seen == steps
        assert (update.drafted, update.accepted) == (handle.drafted, handle.accepted)
        assert (update.drafted, update.accepted) == (whole.drafted_by, whole.accepted_by)
        for update in other.updates():
            assert (update.drafts < 0).all()
            assert (update.refused < 0).all()
            assert not any(update.drafted.values())
        out = engine.generate(ROWS, settings_of(drafter))
        assert out.drafted_by["masks"] + out.drafted_by["lookup"] == sum(out.drafted)


def test_transformers_streamers_get_the_drafts(gated: Any) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.put_ids: list[int] = []
            self.drafts: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.put_ids += value.flatten().tolist()

        def put_draft(self, value: torch.Tensor) -> None:
            self.drafts.append(value.tolist())

        def end(self) -> None:
            pass

    streamer = Recorder()
    fields: dict[str, Any] = {"mode": "speculative", "drafter": "masks", "draft_tokens": 4, "draft_threshold": 0.0}
    whole = gated.generate(
        torch.tensor([ROWS[0]]), custom_generate=pb.custom_generate, max_new_tokens=40, do_sample=False,
        eos_token_id=63, streamer=streamer, **fields,
    )  # fmt: skip
    assert streamer.put_ids == whole[0].tolist()
    expected = [s.draft().tolist() for s in pb.stream(gated, ROWS[0], settings_of("masks")) if len(s.draft())]
    assert streamer.drafts == expected
