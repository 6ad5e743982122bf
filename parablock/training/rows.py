"""Samples -> the rows and batches a training step reads, noise included."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from parablock.config import TrainConfig
from parablock.data.chat import IGNORE, Sample
from parablock.data.packing import pack, pad_to_block
from parablock.diffusion.noise import sample_noise

Row = dict[str, Tensor]  # input_ids, labels, noise_mask: [L] each; samples: [L / block size]


class RowDataset(Dataset[Row]):
    """Rows of one or more samples, each sample with its own noise for this epoch.

    `samples` may be lazy (anything with `len` and indexing); packing has to read all of them once. The switches are
    those of `TrainConfig`.
    """

    def __init__(self, samples: Sequence[Sample], config: TrainConfig, pad_token_id: int) -> None:
        if not len(samples):
            raise ValueError("there are no samples to train on")
        self.samples = samples
        self.config = config
        self.pad_token_id = pad_token_id
        self.epoch = 0
        self.groups: list[list[int]] | None = None
        if config.packing:
            aligned_to = config.block_size if config.block_padding else 1
            self.groups = pack([len(s.input_ids) for s in samples], aligned_to, config.context_length)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of every epoch: fresh noise for every sample."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples if self.groups is None else self.groups)

    def __getitem__(self, index: int) -> Row:
        size = self.config.block_size
        numbers = [index] if self.groups is None else self.groups[index]
        parts = [self.samples[number] for number in numbers]
        if self.config.block_padding:
            parts = [pad_to_block(part, size, self.pad_token_id) for part in parts]
        else:  # samples share blocks, and noise is drawn for the row
            whole = Sample([i for p in parts for i in p.input_ids], [i for p in parts for i in p.labels])
            numbers, parts = numbers[:1], [pad_to_block(whole, size, self.pad_token_id)]
        length = sum(len(part.input_ids) for part in parts)
        if length > self.config.context_length:
            context = self.config.context_length
            raise ValueError(f"sample {index} needs {length} tokens, more than the context of {context}")
        noise = torch.cat([self._noise(n, len(p.input_ids)) for n, p in zip(numbers, parts, strict=True)])
        # nothing stands before a sample's first token to predict it from
        labels = torch.tensor([label for p in parts for label in (IGNORE, *p.labels[1:])])
        if not self.config.complementary and self.config.mode == "diffusion":
            labels[~noise] = IGNORE  # what the first view leaves visible is not learned in another
        row = {
            "input_ids": torch.tensor([i for p in parts for i in p.input_ids]),
            "labels": labels,
            "noise_mask": noise,
        }
        if self.config.packing and self.config.isolate_samples:
            blocks = [torch.full((len(p.input_ids) // size,), place) for place, p in enumerate(parts)]
            row["samples"] = torch.cat(blocks)
        return row

    def _noise(self, sample: int, length: int) -> Tensor:
        return sample_noise(length, self.config.block_size, seed=self.config.seed, epoch=self.epoch, sample=sample)


def collate(rows: list[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Rows -> a batch `[B, longest row]`, padded on the right; `samples` `[B, longest row / block size]`."""
    fill: dict[str, Any] = {"input_ids": pad_token_id, "labels": IGNORE, "noise_mask": False, "samples": -1}
    batch = {}
    for name in rows[0]:
        batch[name] = torch.full((len(rows), max(len(row[name]) for row in rows)), fill[name])
        for i, row in enumerate(rows):
            batch[name][i, : len(row[name])] = row[name]
    return batch
