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
    """Share samples of the given `lengths` (tokens) out over rows: first fit, in order of decreasing length.

    Returns the sample indices of every row. A sample's length counts rounded up to whole blocks.

    Raises:
        ValueError: a sample is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []  # tokens left in each row
    first_open = 0  # rows before this one are full
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need = lengths[index] + -lengths[index] % block_size
        if need > context_length:
            raise ValueError(
                f"sample {index} has {lengths[index]} tokens, more than the context length {context_length}; "
                "raise context_length or drop the sample"
            )
        row = next((r for r in range(first_open, len(rows)) if room[r] >= need), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(context_length)
        rows[row].append(index)
        room[row] -= need
        while first_open < len(rows) and room[first_open] < block_size:
            first_open += 1
    return rows
