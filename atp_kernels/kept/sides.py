"""One side of a weight as a slice takes it: which positions, in which order, and where each of them then lies."""

from collections.abc import MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from atp_kernels import checks
from atp_kernels.compaction.definition import round_up
from atp_kernels.devices import upload
from atp_kernels.kinds import typed


@dataclass(frozen=True, slots=True)
class Side:
    """Where the positions of one whole side lie in the slice; None instead of a Side where nothing is removed.

    kept_first=False: the whole side keeps its order. index [width] holds the kept positions, then fillers whose weight
    is zero; place [size] tells where each position lies in the slice, and sends the removed ones to a filler.
    kept_first=True: the whole side is permuted, the slice is its head. index [size] lists the positions in their new
    order, place [size] is the inverse permutation.
    """

    index: Tensor
    place: Tensor
    kept_first: bool


class KeptFirst:
    """A hard mask whose side lies in the order [kept, removed], shared by all producers and consumers of that side.

    mask [size]: bool, True keeps. `index` [size] lists the old positions in the new order (kept ones rising, then
    removed ones rising), `place` [size] is the inverse: values[..., index] brings activations into the order,
    values[..., place] back. `kept` counts kept positions, `width` those that a slice multiplies: `kept` rounded up to
    `pad_to`, at most size; weights of the removed ones among them count as zero. device: where `index` and `place` lie,
    that of the mask by default. reuse: an earlier one, whose memory this one takes where it has the size (`KeptSlice`
    says what follows). Making one waits for the device of the mask, so from a mask on the host it waits for nothing.
    Raises ValueError for a wrong shape or dtype.

    >>> order = KeptFirst(torch.tensor([False, True, False, True]))
    >>> order.index, order.kept
    (tensor([1, 3, 0, 2]), 2)
    >>> torch.tensor([10, 11, 12, 13])[order.index]
    tensor([11, 13, 10, 12])
    """

    @typed
    def __init__(
        self,
        mask: Tensor,
        *,
        pad_to: int = 32,
        device: torch.device | str | None = None,
        reuse: "KeptFirst | None" = None,
    ) -> None:
        if mask.ndim != 1 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be a 1-D bool tensor, not {mask.dtype} of shape {list(mask.shape)}.")
        check_padding(pad_to)
        check_values("mask", mask)
        target = mask.device if device is None else torch.device(device)
        refuse_capture(target)
        self.mask, self.size, self._mask_version = mask, mask.numel(), version_of(mask)
        kept = mask.nonzero().squeeze(1)
        self.kept = kept.numel()
        self.width = min(round_up(self.kept, pad_to), self.size)
        index = torch.cat([kept, (~mask).nonzero().squeeze(1)])
        places = torch.arange(self.size, device=mask.device)
        place = torch.empty_like(places).index_copy_(0, index, places)
        self.index, self.place = upload((index, place), target)
        self.given_away = False
        if reuse is not None and not reuse.given_away:
            self.index, self.place = into(reuse.index, self.index), into(reuse.place, self.place)
            reuse.given_away = True

    def __getstate__(self) -> dict[str, object]:
        """For a copy, as that of a `KeptSlice`."""
        return self.__dict__ | {"_mask_version": version_of(self.mask) == self._mask_version}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._mask_version = version_of(self.mask) if self._mask_version else CHANGED

    def __repr__(self) -> str:
        return f"KeptFirst(kept {self.kept}/{self.size}, width {self.width}, {self.index.device})"


@dataclass(frozen=True)
class Gather:
    """How one side of the weight becomes that of the slice.

    count: kept positions. index [width]: what the slice takes, None for the whole side. silent: the positions of the
    slice whose weight is zero. side: what the product must know, None where the whole side lies in the slice as it is.
    """

    count: int
    index: Tensor | None
    silent: Tensor
    side: Side | None

    @classmethod
    def of(cls, mask: Tensor | KeptFirst | None, pad_to: int) -> "Gather | None":
        if isinstance(mask, KeptFirst):
            if mask.kept == mask.size:
                return None
            silent = torch.arange(mask.kept, mask.width, device=mask.index.device)
            return cls(mask.kept, mask.index[: mask.width], silent, Side(mask.index, mask.place, True))
        if mask is None:
            return None
        kept = mask.nonzero().squeeze(1)
        if kept.numel() == mask.numel():
            return None
        # One filler at least: what it multiplies to is the zero that removed positions read.
        size, count = mask.numel(), kept.numel()
        width = round_up(count + 1, pad_to)
        if width >= size:
            return cls(count, None, (~mask).nonzero().squeeze(1), None)
        # Fillers repeat a kept position, so that they bring no value of a removed one near the product.
        filler = kept[-1:] if count else kept.new_zeros(1)
        places = torch.arange(width, device=mask.device)
        place = torch.full_like(mask, count, dtype=torch.int64).index_copy_(0, kept, places[:count])
        index = torch.cat([kept, filler.expand(width - count)])
        return cls(count, index, places[count:], Side(index, place, False))

    def zeroed(self) -> "Gather":
        """This without a cut in the model's order: zeros take the place of what is removed. It waits for no device."""
        if self.index is None or self.side is None or self.side.kept_first:
            return self
        # Removed positions read the first filler. Their number is known, so that nobody has to ask the device.
        removed = (self.side.place == self.count).to(torch.uint8)
        silent = removed.argsort(descending=True, stable=True)[: removed.numel() - self.count]
        return Gather(self.count, None, silent, None)

    def to(self, device: torch.device) -> "Gather":
        """This on a device; from the host nobody waits for it."""
        if self.silent.device == device:
            return self
        if self.index is None or self.side is None:  # a side that lies in the slice as it is
            return replace(self, silent=upload((self.silent,), device)[0])
        index, silent, place = upload((self.index, self.silent, self.side.place), device)
        return Gather(self.count, index, silent, Side(index, place, self.side.kept_first))


def count_kept(mask: Tensor, pad_to: int = 32) -> int:
    """How many positions a bool mask keeps; for what a `CallSlice` then needs no device is waited for again."""
    if mask.device.type == "cpu":
        return int(mask.count_nonzero())
    gather = remembered(mask, pad_to)
    return mask.numel() if gather is None else gather.count


def remembered(mask: Tensor, pad_to: int) -> "Gather | None":
    """`Gather.of` an unchanged mask, made once."""
    version, found = version_of(mask), _REMEMBERED.get(mask)
    if version is None:
        return Gather.of(mask, pad_to)
    if found is None or found[:2] != (version, pad_to):
        found = _REMEMBERED[mask] = version, pad_to, Gather.of(mask, pad_to)
    return found[2]


_REMEMBERED: MutableMapping[Tensor, tuple[int, int, Gather | None]] = WeakTensorKeyDictionary()
"""Masks on devices that are waited for, each with its version, the padding and what was made of it."""


def side_into(old: Side | None, new: Side | None) -> tuple[Side | None, bool]:
    """(the new side in the memory of the old one where that is of its size, whether all of it lies there)."""
    if old is None or new is None:
        return new, new is old
    if not (old.kept_first or new.kept_first):  # a `KeptFirst` took its memory itself
        new = Side(into(old.index, new.index), into(old.place, new.place), False)
    return new, new.index is old.index and new.place is old.place


def into(old: Tensor, new: Tensor) -> Tensor:
    """`new` in the memory of `old` where that is of its shape and dtype and on its device."""
    fits = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device) and not old.is_inference()
    return old.copy_(new) if fits else new


CHANGED = -1
"""The version of what had changed before it was copied, which no tensor has."""


def version_of(tensor: Tensor | KeptFirst | None) -> int | None:
    """How often a tensor was changed in place, None where torch does not count.

    `Tensor._version` is what torch's own error about changed saved tensors prints; it has no public name.
    """
    if isinstance(tensor, KeptFirst):
        return version_of(tensor.mask)
    return None if tensor is None or tensor.is_inference() else tensor._version


def refuse_capture(device: torch.device) -> None:
    checks.refuse_capture(device, "the making of a KeptFirst or KeptSlice, which the host does", "make it before")


def check_values(name: str, mask: Tensor) -> None:
    if mask.is_meta:
        raise ValueError(f"{name} is on meta, where it has no values to count: make it on the host.")


def check_padding(pad_to: int) -> None:
    if not 1 <= pad_to < 2**31:
        raise ValueError(f"pad_to is {pad_to}: give a positive multiple, 1 for no padding.")
