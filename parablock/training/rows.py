"""Samples -> the rows and batches a training step reads, noise included."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from parablock.data.chat import IGNORE, Sample
from parablock.data.packing import pack, pad_to_block
from parablock.diffusion.noise import sample_noise

Row = dict[str, Tensor]  # input_ids, labels, noise_mask: [L] each


class RowDataset(Dataset[Row]):
    """Block-aligned rows of one or more samples, each sample with its own noise for this epoch.

    `samples` may be lazy (anything with `len` and indexing); packing has to read all of them once.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        block_size: int,
        context_length: int,
        pad_token_id: int,
        packing: bool,
        seed: int,
    ) -> None:
        if not len(samples):
            raise ValueError("there are no samples to train on")
        self.samples = samples
        self.block_size = block_size
        self.context_length = context_length
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.epoch = 0
        self.groups: list[list[int]] | None = None
        if packing:
            self.groups = pack([len(s.input_ids) for s in samples], block_size, context_length)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of every epoch: fresh noise for every sample."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples if self.groups is None else self.groups)

    def __getitem__(self, index: int) -> Row:
        ids: list[int] = []
        labels: list[int] = []
        noise: list[Tensor] = []
        for number in [index] if self.groups is None else self.groups[index]:
            sample = pad_to_block(self.samples[number], self.block_size, self.pad_token_id)
            ids += sample.input_ids
            labels += sample.labels
            length = len(sample.input_ids)
            noise.append(sample_noise(length, self.block_size, seed=self.seed, epoch=self.epoch, sample=number))
        if len(ids) > self.context_length:
            raise ValueError(f"sample {index} needs {len(ids)} tokens, more than the context of {self.context_length}")
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "noise_mask": torch.cat(noise)}


def collate(rows: list[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Rows -> a batch `[B, longest row]`, padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    fill: dict[str, Any] = {"input_ids": pad_token_id, "labels": IGNORE, "noise_mask": False}
    batch = {}
    for name, value in fill.items():
        batch[name] = torch.full((len(rows), length), value)
        for i, row in enumerate(rows):
            batch[name][i, : len(row[name])] = row[name]
    return batch
