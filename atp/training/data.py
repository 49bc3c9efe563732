"""Which samples a step reads: a pure function of seed and position, so that resuming needs no replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from atp.data import collate
from atp.ground.devices import upload
from atp.processes import processes
from atp.removal.refit import HELD_OUT

Batch = dict[str, Any]
"""What `atp.data.collate` makes, its tensors on the device of the model."""

_AT_ONCE = 2560  # tokens in a pass of the refit
_POOL = 50  # batches that are sorted by length together: long enough to be alike, short enough to stay mixed


class RunOrder:
    """`total` sample indices: one seeded permutation of range(size) after another, cut where the run ends."""

    def __init__(self, size: int, total: int, seed: int) -> None:
        self.size, self.total, self.seed = size, total, seed
        self._order = lru_cache(maxsize=2)(self._epoch)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        for epoch in range((self.total + self.size - 1) // self.size):
            yield from self._order(epoch)[: self.total - epoch * self.size]

    def at(self, start: int, count: int) -> list[int]:
        """The indices at positions start .. start + count - 1."""
        return [self._order(p // self.size)[p % self.size] for p in range(start, start + count)]

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
    return RunOrder(sized(dataset), total, seed) if lengths is None else GroupedOrder(lengths, batch_size, total, seed)


def sized(dataset: Dataset) -> int:
    """Number of samples. torch's `Dataset` promises no length, ours have one."""
    assert isinstance(dataset, Sized)
    return len(dataset)


def batch_at(dataset: Dataset, index: int, size: int, seed: int, device: torch.device) -> Batch:
    """The batch with this number, of `size` samples in the seeded order, on the device."""
    return to_device(
        collate([dataset[row] for row in run_order(dataset, size, 0, seed).at(index * size, size)]), device
    )


def refit_size(length: float, windows: int) -> int:
    """How many of so many calibration windows, of `length` tokens on average, a batch of the refit has; some one more.

    What a pass costs beyond its tokens, as merging LoRA into the weights, is paid once for all of them.
    """
    return max(1, min(int(_AT_ONCE / length), windows // HELD_OUT))


def refit_orders(dataset: Dataset, windows: int, seed: int) -> list[list[int]]:
    """The samples of each batch that the refit reads, `windows` of them in all.

    Every eighth batch holds every eighth window of the seeded order, which the refit holds out; samples of like length
    share a batch. So neither the size of a batch nor the number of processes changes what is fitted to what.
    """
    rows = run_order(dataset, 1, 0, seed).at(0, windows)
    lengths = getattr(dataset, "lengths", None) or [len(cast(Any, dataset)[0]["input_ids"])] * sized(dataset)
    held = sorted(rows[HELD_OUT - 1 :: HELD_OUT], key=lengths.__getitem__)
    if not held:
        return [[row] for row in rows]
    fitted = [row for place, row in enumerate(rows, 1) if place % HELD_OUT]
    fitted.sort(key=lengths.__getitem__)
    count = -(-len(held) // refit_size(sum(lengths) / len(lengths), windows))
    batches = iter(_split(fitted, count * (HELD_OUT - 1)))
    return [batch for last in _split(held, count) for batch in (*islice(batches, HELD_OUT - 1), last)]


def _split(rows: list[int], count: int) -> list[list[int]]:
    """The rows in so many parts, as equal as can be."""
    bounds = [len(rows) * part // count for part in range(count + 1)]
    return [rows[start:stop] for start, stop in pairwise(bounds)]


def refit_batch(dataset: Dataset, rows: Sequence[int], device: torch.device) -> Batch:
    """A batch of these samples, on the device, and where rows are padded `text`, bool [batch, longest]: what is not."""
    samples = [dataset[row] for row in rows]
    batch = collate(samples)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    if batch["tokens"] < batch["input_ids"].numel():
        batch["text"] = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    return to_device(batch, device)


def step_batches(
    dataset: Dataset, first: int, end: int, *, size: int, accumulation: int, seed: int, device: torch.device
) -> Iterator[list[Batch]]:
    """This process's batches of the steps first .. end - 1, `accumulation` of `size` samples per step.

    Processes take turns: batch k of the run goes to process k modulo their number. A step's batches are made when they
    are asked for. The call draws one number from torch's generator, as iterating over any `DataLoader` does.
    """
    order = run_order(dataset, size, 0, seed)
    numbers = (n * processes.count() + processes.rank() for n in range(first * accumulation, end * accumulation))
    rows = (order.at(number * size, size) for number in numbers)
    loader = DataLoader(dataset, batch_sampler=rows, collate_fn=collate, pin_memory=device.type == "cuda")
    batches = (to_device(batch, device) for batch in loader)
    return iter(lambda: list(islice(batches, accumulation)), [])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {k: upload(v, device) if isinstance(v, Tensor) else v for k, v in batch.items()}
