"""Samples -> the rows and batches a training step reads, noise included."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from parablock.data.chat import IGNORE, Sample
from parablock.data.packing import pack, pad_to_block
from parablock.diffusion.noise import sample_noise, seeded_generator
from parablock.training.config import TrainConfig

Row = dict[str, Tensor]  # input_ids, labels, noise_mask or anchors: [L] each; samples: [L / block size]


class RowDataset(Dataset[Row]):
    """All rows of a training in the order they are trained on, epoch after epoch, each with its own noise or anchors.

    Item i is row i of the run: the same however many processes share the rows out, and wherever the run is resumed.
    `samples` may be lazy (anything with `len` and indexing); packing reads all of them once unless their `lengths` are
    given. The switches are those of `TrainConfig`.
    """

    def __init__(
        self, samples: Sequence[Sample], config: TrainConfig, pad_token_id: int, lengths: Sequence[int] | None = None
    ) -> None:
        if not len(samples):
            raise ValueError("there are no samples to train on")
        self.samples = samples
        self.config = config
        self.pad_token_id = pad_token_id
        self.groups: Sequence[Sequence[int]] = [[number] for number in range(len(samples))]
        if config.packing:
            aligned_to = config.block_size if config.block_padding else 1
            lengths = [len(s.input_ids) for s in samples] if lengths is None else list(lengths)
            self.groups = pack(lengths, aligned_to, config.context_length)
        self._order: tuple[int, list[int]] = (-1, [])  # of the epoch that was read last

    def __len__(self) -> int:
        return self.config.steps * self.config.batch_size

    def __getitem__(self, index: int) -> Row:
        epoch, place = divmod(index, len(self.groups))
        if self._order[0] != epoch:
            generator = seeded_generator(self.config.seed, epoch, "order")
            self._order = epoch, torch.randperm(len(self.groups), generator=generator).tolist()
        return self.row(self._order[1][place], epoch)

    def row(self, number: int, epoch: int) -> Row:
        """Row `number` of the data, with the noise or the anchors of `epoch`."""
        size = self.config.block_size
        numbers = list(self.groups[number])
        parts = [self.samples[number] for number in numbers]
        if self.config.block_padding:
            parts = [pad_to_block(part, size, self.pad_token_id) for part in parts]
        else:  # samples share blocks, and noise is drawn for the row
            whole = Sample([i for p in parts for i in p.input_ids], [i for p in parts for i in p.labels])
            numbers, parts = numbers[:1], [pad_to_block(whole, size, self.pad_token_id)]
        length = sum(len(part.input_ids) for part in parts)
        if length > self.config.context_length:
            context = self.config.context_length
            raise ValueError(f"sample {numbers[0]} needs {length} tokens, more than the context of {context}")
        # nothing stands before a sample's first token to predict it from
        labels = torch.tensor([label for p in parts for label in (IGNORE, *p.labels[1:])])
        row = {"input_ids": torch.tensor([i for p in parts for i in p.input_ids]), "labels": labels}
        if self.config.context == "causal":
            row["anchors"] = draw_anchors(parts, self.config.anchors, self.config.seed, epoch, numbers[0])
        else:
            drawn = (self._noise(n, epoch, len(p.input_ids)) for n, p in zip(numbers, parts, strict=True))
            row["noise_mask"] = noise = torch.cat(list(drawn))
            if not self.config.complementary and self.config.mode == "diffusion":
                labels[~noise] = IGNORE  # what the first view leaves visible is not learned in another
        if self.config.packing and self.config.isolate_samples:
            blocks = [torch.full((len(p.input_ids) // size,), place) for place, p in enumerate(parts)]
            row["samples"] = torch.cat(blocks)
        return row

    def _noise(self, sample: int, epoch: int, length: int) -> Tensor:
        return sample_noise(length, self.config.block_size, seed=self.config.seed, epoch=epoch, sample=sample)


def draw_anchors(parts: Sequence[Sample], count: int, *key: int, ahead: int = 2) -> Tensor:
    """Where in a row drafts begin `[L]` (bool): at most `count` of the tokens that have a label `ahead` of them.

    The first mask behind a token predicts the one after the next. What is drawn depends on `key` alone.
    """
    none = [IGNORE] * ahead
    labels = torch.tensor([label for p in parts for label in (*p.labels[ahead:], *none)[: len(p.labels)]])
    learned = labels != IGNORE
    places = learned.nonzero()[:, 0]
    chosen = torch.randperm(len(places), generator=seeded_generator(*key, "anchors"))[:count]
    return torch.zeros_like(learned).index_fill(0, places[chosen], True)


def collate(rows: list[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Rows -> a batch `[B, longest row]`, padded on the right; `samples` `[B, longest row / block size]`."""
    fill: dict[str, Any] = {
        "input_ids": pad_token_id, "labels": IGNORE, "noise_mask": False, "anchors": False, "samples": -1,
    }  # fmt: skip
    batch = {}
    for name in rows[0]:
        batch[name] = torch.full((len(rows), max(len(row[name]) for row in rows)), fill[name])
        for i, row in enumerate(rows):
            batch[name][i, : len(row[name])] = row[name]
    return batch
