"""Samples -> block-aligned rows.

Each sample is padded to a multiple of the block size, so that no block holds two samples; then as many samples as fit
stand one after the other in a row of the context length (Fast-dLLM v2, section 3.1).
"""

from collections.abc import Sequence

from parablock.data.chat import IGNORE, Sample


def pad_to_block(sample: Sample, block_size: int, pad_token_id: int) -> Sample:
    """`sample` with padding (label -100) up to the next multiple of `block_size`."""
    missing = -len(sample.input_ids) % block_size
    return Sample(sample.input_ids + [pad_token_id] * missing, sample.labels + [IGNORE] * missing)


def pack(lengths: Sequence[int], block_size: int, context_length: int) -> list[list[int]]:
    """Share samples of the given `lengths` (tokens) out over rows: the fullest row that still fits, longest first.

    Returns the sample indices of every row. A sample's length counts rounded up to whole blocks.

    Raises:
        ValueError: a sample is longer than a row.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(context_length // block_size + 1)]  # rows, by blocks left
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = -(-lengths[index] // block_size)
        if need >= len(with_room):
            raise ValueError(
                f"sample {index} has {lengths[index]} tokens, more than the context length {context_length}; "
                "raise context_length or drop the sample"
            )
        room = next((blocks for blocks in range(need, len(with_room)) if with_room[blocks]), None)
        if room is None:
            room, row = len(with_room) - 1, len(rows)
            rows.append([])
        else:
            row = with_room[room].pop()
        rows[row].append(index)
        with_room[room - need].append(row)
    return rows
