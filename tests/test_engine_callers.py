"""The engine's callers: handles, updates, threads, and errors that stay where they belong."""

import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BASE, ENDLESS, ROWS, SMALL, empty, prompt
from conftest import small_model

import parablock as pb
from parablock.engine.graphs import Graphs
from parablock.engine.request import QueueFullError


@pytest.fixture
def engine(model: Any) -> Iterator[pb.Engine]:
    with pb.Engine(model, SMALL) as engine:
        yield engine


def test_updates_add_up_to_the_answer(model: Any, engine: pb.Engine) -> None:
    for mode in ("diffusion", "autoregressive"):
        config = replace(BASE, mode=mode)
        handles = [engine.submit(pb.Request(row, config, stream=True)) for row in ROWS[:6]]
        for handle, row in zip(handles, ROWS[:6], strict=True):
            tokens: list[int] = []
            seen: set[int] = set()
            for update in handle.updates():
                tokens += update.tokens
                assert tokens == handle.tokens[: len(tokens)]
                assert not (update.revealed & update.masked).any()
                for column in update.revealed.nonzero()[0]:
                    position = update.start + int(column)
                    assert position not in seen
                    seen.add(position)
                    assert 0 < update.confidence[column] <= 1
                    settled = position - len(row)
                    if settled < len(tokens):
                        assert update.ids[column] == tokens[settled]
                assert update.done == handle.done or not update.done
            assert update.done
            assert tokens == handle.result() == pb.generate(model, row, config).tokens[0]
            assert handle.first_token is not None
            assert handle.seconds is not None
            assert handle.first_token <= handle.seconds
            assert handle.finish_reason == ("stop" if tokens[-1] in (7, 21) else "length")


def test_a_thread_runs_the_steps_for_many_callers(model: Any) -> None:
    expected = pb.generate(model, ROWS, BASE).tokens
    got: list[Any] = [None] * 24
    with pb.Engine(model, SMALL) as engine:
        engine.start()

        def call(i: int) -> None:
            if i % 3 == 2:
                streamed = engine.submit(pb.Request(ROWS[i % 9], BASE, stream=True))
                got[i] = [t for update in streamed.updates(timeout=60) for t in update.tokens]
            else:
                got[i] = engine.submit(pb.Request(ROWS[i % 9], BASE)).result(timeout=60)

        callers = [threading.Thread(target=call, args=(i,)) for i in range(len(got))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert engine.generate(ROWS, BASE).tokens == expected
    assert got == [expected[i % 9] for i in range(len(got))]


def test_closing_ends_what_runs(model: Any) -> None:
    for threaded in (False, True):
        engine = pb.Engine(model, SMALL)
        if threaded:
            engine.start()
        handles = [engine.submit(pb.Request(row, replace(BASE, stop_token_ids=()))) for row in ROWS]
        if not threaded:
            engine.step()
        engine.close()
        engine.close()
        for handle in handles:
            assert handle.done
        with pytest.raises(RuntimeError, match="the engine was closed"):
            handles[-1].result()
        with pytest.raises(ValueError, match="the engine is closed"):
            engine.submit(pb.Request(ROWS[0]))
        assert empty(engine)


def test_cancelling(model: Any, engine: pb.Engine) -> None:
    config = replace(BASE, threshold=1.0, stop_token_ids=())
    handles = [engine.submit(pb.Request(row, config)) for row in ROWS[:5]]
    handles[4].cancel()  # before it was even looked at
    for _ in range(6):
        engine.step()
    handles[0].cancel()  # running
    handles[3].cancel()  # waiting
    handles[3].cancel()
    engine.step()
    assert [h.status for h in handles] == ["cancelled", "running", "running", "cancelled", "cancelled"]
    expected = pb.generate(model, ROWS[:5], config).tokens
    assert handles[0].result() == expected[0][: len(handles[0].tokens)]
    assert handles[1].result() == expected[1]
    handles[1].cancel()  # has ended: stays as it is
    assert handles[1].status == "finished"
    assert handles[2].result() == expected[2]
    assert empty(engine)


def test_a_failing_step_fails_its_requests_alone(
    model: Any, engine: pb.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(BASE, stop_token_ids=())
    handles = [engine.submit(pb.Request(row, config)) for row in ROWS[:5]]
    engine.step()
    forward = engine.runner._forward

    def broken(*args: Any) -> Any:
        monkeypatch.setattr(engine.runner, "_forward", forward)
        raise torch.OutOfMemoryError("no memory for this step")

    monkeypatch.setattr(engine.runner, "_forward", broken)
    engine.step()
    assert [h.status for h in handles] == ["failed"] * 3 + ["waiting"] * 2
    with pytest.raises(RuntimeError, match="no memory for this step"):
        handles[0].result()
    assert [h.result() for h in handles[3:]] == pb.generate(model, ROWS[3:5], config).tokens
    assert empty(engine)


def test_an_interrupt_leaves_the_engine_usable(model: Any, engine: pb.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine.runner._forward
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(engine.runner, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(ROWS, BASE)
    assert engine.generate(ROWS, BASE).tokens == pb.generate(model, ROWS, BASE).tokens
    assert empty(engine)


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        ([], BASE, "prompt 0 is empty"),
        ([64], BASE, "outside the vocabulary of 64"),
        (prompt(0, 60), BASE, "max_new_tokens=24 exceed the engine's context of 64"),
        ([1], replace(BASE, block_size=16), "block_size=16, but this engine runs blocks of 8"),
        ([1], replace(BASE, sub_block_size=3), "sub_block_size=3"),
    ],
)
def test_wrong_requests(engine: pb.Engine, row: list[int], config: pb.DecodeConfig, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            engine.submit(pb.Request(row, config))
    assert empty(engine)


def test_wrong_engines(model: Any) -> None:
    for settings_, message in (
        ({"max_rows": 0}, "max_rows=0"),
        ({"max_context": 1000}, "max_context=1000 exceeds the model's context of 256"),
        ({"cuda_graphs": True}, "cuda_graphs=True needs a CUDA device"),
    ):
        with pytest.raises(ValueError, match=message):
            pb.Engine(model, pb.EngineConfig(**settings_))
    assert model.config._attn_implementation == "sdpa"
    with pb.Engine(model, pb.EngineConfig(kv_tokens=16, max_rows=1)) as engine:
        with pytest.raises(ValueError, match="need more than the K/V memory of 16 tokens"):
            engine.submit(pb.Request(ROWS[0], BASE))
        with pb.Engine(small_model()) as other, pytest.raises(ValueError, match="belongs to another engine"):
            engine.cancel(other.submit(pb.Request(ROWS[0], BASE)))
        quiet = engine.submit(pb.Request([1], replace(BASE, max_new_tokens=2)))
        with pytest.raises(ValueError, match="stream=False"):
            next(quiet.updates())
        with pytest.raises(TimeoutError, match="still waiting after 0 seconds"):
            quiet.result(timeout=0)
        # without max_new_tokens: what the memory leaves
        assert engine.submit(pb.Request([1], replace(BASE, max_new_tokens=None))).config.max_new_tokens == 15


def test_what_goes_wrong_while_a_request_is_admitted_is_its_own(model: Any) -> None:
    with pb.Engine(model, SMALL) as engine:
        engine.start()
        before = engine.submit(pb.Request(ROWS[0], ENDLESS))
        broken = engine.submit(pb.Request(ROWS[1], replace(BASE, stop_token_ids=(2**70,))))  # no room in 64 bits
        after = engine.submit(pb.Request(ROWS[2], BASE))
        with pytest.raises(RuntimeError, match="int"):
            broken.result(timeout=60)
        assert before.result(timeout=60) == pb.generate(model, ROWS[0], ENDLESS).tokens[0]
        assert after.result(timeout=60) == pb.generate(model, ROWS[2], BASE).tokens[0]
        assert not engine.closed
    assert empty(engine)


def test_what_goes_wrong_while_a_request_is_told_is_its_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pb.Engine(model, SMALL) as engine:
        handles = [engine.submit(pb.Request(row, BASE, stream=True)) for row in ROWS[:3]]
        engine.step()
        monkeypatch.setattr(handles[1], "_updates", None)
        for i in (0, 2):
            assert handles[i].result() == pb.generate(model, ROWS[i], BASE).tokens[0]
        assert handles[1].status == "failed"
        assert empty(engine)


def test_a_request_that_comes_while_the_engine_closes_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from parablock.engine import engine as module

    with pb.Engine(model, SMALL) as other:  # keeps the model's attention with the engines
        engine = pb.Engine(model, SMALL)
        resolve = module.resolve_request
        monkeypatch.setattr(module, "resolve_request", lambda *a: (engine.close(), resolve(*a))[1])
        with pytest.raises(ValueError, match="the engine is closed"):
            engine.submit(pb.Request(ROWS[0], BASE))
        monkeypatch.setattr(module, "resolve_request", resolve)
        assert engine.step() is False
        with pytest.raises(RuntimeError, match="the engine is closed"):  # not zeros
            engine.runner.check(engine.batch.rows, engine.batch.table_RP)
        assert other.generate(ROWS, BASE).tokens == pb.generate(model, ROWS, BASE).tokens


@pytest.mark.parametrize("threaded", [False, True])
def test_an_engine_that_can_run_nothing_any_more_stops(
    model: Any, threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pb.Engine(model, SMALL) as engine:
        handles = [engine.submit(pb.Request(row, ENDLESS)) for row in ROWS[:5]]
        engine.step()

        def lost(*args: Any) -> Any:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(engine.runner, "_forward", lost)
        if threaded:
            engine.start()
        for handle in handles:
            with pytest.raises(RuntimeError, match="the device is gone"):
                handle.result(timeout=60)
        assert engine.closed
        assert str(engine.error) == "the device is gone"
        with pytest.raises(ValueError, match=r"closed \(the device is gone\)"):
            engine.submit(pb.Request(ROWS[0]))
        assert empty(engine)
    assert model.config._attn_implementation == "sdpa"


def test_the_queue_has_an_end_whoever_submits(model: Any) -> None:
    config = pb.EngineConfig(max_rows=2, max_queue=3, max_context=64)
    with pb.Engine(model, config) as engine:
        taken: list[Any] = []
        refused: list[Exception] = []

        def submit(i: int) -> None:
            try:
                taken.append(engine.submit(pb.Request(ROWS[i % 3], BASE)))
            except QueueFullError as error:
                refused.append(error)

        callers = [threading.Thread(target=submit, args=(i,)) for i in range(40)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert (len(taken), len(refused)) == (5, 35)
        assert "5 requests run or wait" in str(refused[0])
        taken[0].cancel()
        taken[1].result()
        assert engine.submit(pb.Request(ROWS[0], BASE)).result()


def test_streaming_reads_every_token_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pb.Engine(model, pb.EngineConfig()) as engine:
        read: list[int] = []
        tokens = engine.batch.rows.tokens
        monkeypatch.setattr(engine.batch.rows, "tokens", lambda *a: (found := tokens(*a), read.append(len(found)))[0])
        handle = engine.submit(pb.Request(ROWS[0], replace(ENDLESS, threshold=1.0, max_new_tokens=200), stream=True))
        assert len(handle.result()) == 200
        assert sum(read) == 200


def test_engines_in_threads_keep_their_number_of_threads(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one engine's step works with one thread, another engine's first step gets all of them."""
    torch.set_num_threads(3)
    seen: list[int] = []
    inside, go_on = threading.Event(), threading.Event()
    with pb.Engine(model, SMALL) as few, pb.Engine(model, SMALL) as many:
        forward = few.runner._forward

        def slow(*args: Any) -> Any:
            inside.set()
            assert go_on.wait(60)
            return forward(*args)

        def noting(*args: Any) -> Any:
            seen.append(torch.get_num_threads())
            return forward_of_many(*args)

        forward_of_many = many.runner._forward
        monkeypatch.setattr(few.runner, "_forward", slow)
        monkeypatch.setattr(many.runner, "_forward", noting)
        monkeypatch.setattr(many.runner.threads, "weights", 1e12)  # a step that is worth all threads
        few.start()
        first = few.submit(pb.Request(ROWS[0], BASE))
        assert inside.wait(60)
        many.start()
        many.submit(pb.Request(ROWS[1], BASE)).result(timeout=60)
        go_on.set()
        first.result(timeout=60)
    assert set(seen) == {3}
    assert torch.get_num_threads() == 3


def test_captured_graphs_are_bounded_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bookkeeping of captured graphs; capturing itself needs CUDA."""

    class Recorded:
        def __init__(self, static: torch.Tensor, result: torch.Tensor) -> None:
            self.static, self.result = static, result

        def replay(self) -> None:
            self.result.copy_(self.static * 2)

    def capture(self: Graphs, static: torch.Tensor, compute: Any) -> Any:
        captured.append(static)
        static, result = static.clone(), compute(static)
        return Recorded(static, result), static, result

    captured: list[torch.Tensor] = []
    monkeypatch.setattr(Graphs, "_capture", capture)
    monkeypatch.setattr("parablock.engine.graphs.MOST", 3)
    graphs = Graphs(torch.device("cpu"))
    for i, key in enumerate("abcabdaab"):
        got = graphs.run(key, torch.tensor([float(i)]), lambda x: x * 2)
        assert got.item() == 2 * i
        assert len(graphs) <= 3
    assert len(captured) == 4  # c made room for d
    graphs.clear()
    assert len(graphs) == 0
