"""After a step: what it did, to the handles of the rows that took part.

Shapes: K rows that got predictions.
"""

import logging
import time
from collections.abc import Iterator

from parablock.decoding.decoder import Before, window
from parablock.decoding.logprobs import TokenLogprob
from parablock.decoding.rows import by_drafter
from parablock.decoding.work import Settled
from parablock.engine.batch import Batch
from parablock.engine.request import Handle, Update

log = logging.getLogger(__name__)


def note(batch: Batch, settled: Settled, told: dict[int, TokenLogprob]) -> None:
    """Log-probabilities, by the number of the prediction, of those that became known or are of a prompt."""
    for number, logprob in told.items():
        row, target = int(settled.row_M[number]), int(settled.target_M[number])
        handle = batch.handles[row]
        if handle is not None and (settled.chosen_M[number] or target < batch.rows.prompt_R[row]):
            handle._told[target] = logprob


def tell(batch: Batch, settled: Settled, stood: Before | None) -> Iterator[tuple[int, Handle, Exception | None]]:
    """Updates for those who stream; which rows end with the step, and what went wrong there, if anything did."""
    rows_K, rows = settled.rows_K, batch.rows
    streaming_K = batch.streaming_R[rows_K]
    first_K = (settled.before_K == 0) & (rows.length_R[rows_K] > 0)
    shown = window(rows, settled, rows_K, stood) if streaming_K.any() and stood else None
    for k in (first_K | settled.done_K | streaming_K).nonzero()[0]:
        row, done = int(rows_K[k]), bool(settled.done_K[k])
        handle = batch.handles[row]
        assert handle is not None
        try:
            if first_K[k]:
                handle.first_token = time.perf_counter() - handle.submitted
            if shown is not None and streaming_K[k]:
                new = rows.tokens(row, int(settled.before_K[k]))
                logprobs = handle._logprobs(len(handle.tokens), len(new))
                handle.tokens += new
                handle.logprobs += logprobs
                handle._updates.append(Update(
                    **{name: array[k] for name, array in vars(shown).items()}, tokens=new, logprobs=logprobs,
                    done=done, forwards=int(rows.forwards_R[row]), drafted=by_drafter(rows.drafted_RS[row]),
                    accepted=by_drafter(rows.accepted_RS[row]),
                ))  # fmt: skip
                handle._notify()
            if done:
                last = rows.prompt_R[row] + rows.length_R[row] - 1
                handle.finish_reason = "stop" if rows.stop_R[row] == last else "length"
        except Exception as error:  # what goes wrong for one is no matter of the others
            log.exception("a request failed")
            yield row, handle, error
            continue
        if done:
            yield row, handle, None
