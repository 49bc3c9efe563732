"""The order in which samples are read: a pure function of seed and position, so that resuming needs no replay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


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
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.size, generator=generator).tolist()
