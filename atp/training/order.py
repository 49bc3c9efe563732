"""The order in which samples are read: a pure function of seed and position, so that resuming needs no replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset, Sampler

_POOL = 50  # batches that are sorted by length together: long enough to be alike, short enough to stay mixed


class RunOrder(Sampler[int]):
    """`total` sample indices: one seeded permutation of range(size) after another, cut where the run ends."""

    def __init__(self, size: int, total: int, seed: int) -> None:
        self.size, self.total, self.seed = size, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        for epoch in range((self.total + self.size - 1) // self.size):
            order = self._epoch(epoch)
            yield from order[: self.total - epoch * self.size]

    def at(self, start: int, count: int) -> list[int]:
        """The indices at positions start .. start + count - 1."""
        epochs = {p // self.size: None for p in range(start, start + count)}
        orders = {epoch: self._epoch(epoch) for epoch in epochs}
        return [orders[p // self.size][p % self.size] for p in range(start, start + count)]

    def _epoch(self, epoch: int) -> list[int]:
        return torch.randperm(self.size, generator=self._generator(epoch)).tolist()

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)


class GroupedOrder(RunOrder):
    """`RunOrder` in which the samples of a batch have similar lengths, so that little of it is padding.

    An epoch is whole batches; the samples left over are others in the next one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, total: int, seed: int) -> None:
        self.lengths, self.batch_size = lengths, min(batch_size, len(lengths))
        super().__init__(len(lengths) // self.batch_size * self.batch_size, total, seed)

    def _epoch(self, epoch: int) -> list[int]:
        generator = self._generator(epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()[: self.size]
        batches: list[list[int]] = []
        for start in range(0, self.size, _POOL * self.batch_size):
            pool = sorted(shuffled[start : start + _POOL * self.batch_size], key=self.lengths.__getitem__)
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        mixed = torch.randperm(len(batches), generator=generator).tolist()
        return [index for batch in mixed for index in batches[batch]]


def run_order(dataset: Dataset, batch_size: int, total: int, seed: int) -> RunOrder:
    """The order of `total` samples of a run: by length in batches where the samples differ in it, else by chance."""
    lengths = getattr(dataset, "lengths", None)
    return RunOrder(len(dataset), total, seed) if lengths is None else GroupedOrder(lengths, batch_size, total, seed)
