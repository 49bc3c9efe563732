"""The kept part of a frozen weight, and the order in which a masked side may lie.

A row or column mask is a smaller dense matrix product. What is made here is made once per decision: host-side counts,
index vectors, and at the first use the gathered weight.
"""

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from atp_kernels import checks
from atp_kernels.call import select
from atp_kernels.compaction.definition import round_up
from atp_kernels.devices import upload
from atp_kernels.quantized import QuantizedWeight, refuse_training


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
    that of the mask by default. Making one waits for the device of the mask, so from a mask on the host it waits for
    nothing. Raises ValueError for a wrong shape or dtype.
    """

    def __init__(self, mask: Tensor, *, pad_to: int = 32, device: torch.device | str | None = None) -> None:
        if mask.ndim != 1 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be a 1-D bool tensor, not {mask.dtype} of shape {list(mask.shape)}.")
        _check_padding(pad_to)
        target = mask.device if device is None else torch.device(device)
        _refuse_capture(target)
        self.mask, self.size, self._mask_version = mask, mask.numel(), _version(mask)
        kept = mask.nonzero().squeeze(1)
        self.kept = kept.numel()
        self.width = min(round_up(self.kept, pad_to), self.size)
        index = torch.cat([kept, (~mask).nonzero().squeeze(1)])
        places = torch.arange(self.size, device=mask.device)
        place = torch.empty_like(places).index_copy_(0, index, places)
        self.index, self.place = upload((index, place), target)

    def __repr__(self) -> str:
        return f"KeptFirst(kept {self.kept}/{self.size}, width {self.width}, {self.index.device})"


class KeptSlice:
    """The kept rows and columns of a frozen base weight, made once per decision and read by many `kept_lora_linear`.

    weight [out, in] and bias [out]: floating, without gradient. out_mask [out], in_mask [in]: bool, True keeps, on the
    weight's device or on the host; None keeps all; or a `KeptFirst`, which says that outputs or inputs lie in its order
    and has its index on the weight's device. The slice is held from its first use, and gathered again for another
    dtype. Of a `QuantizedWeight` nothing is held: each use takes and dequantises the kept rows, since a floating slice
    would take back most of what quantising saves. pad_to: multiple to which kept counts of bool masks are padded
    (vendor GEMMs are slow on odd widths), never visible in results. Make a new slice when a mask or the weight changed:
    a weight or bias that did, in place, makes the next use raise RuntimeError. torch counts no changes through `.data`
    or of inference tensors, and a compiled program does not look. Making one waits for the device of a bool mask, so
    for nothing where the mask lies on the host; using it never waits. Raises ValueError for wrong shapes, dtypes,
    devices or options.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        out_mask: Tensor | KeptFirst | None = None,
        in_mask: Tensor | KeptFirst | None = None,
        pad_to: int = 32,
    ) -> None:
        _check_slice(weight, bias, out_mask, in_mask)
        _check_padding(pad_to)
        _refuse_capture(weight.device)
        given = ("weight", weight), ("bias", bias)
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.out_mask, self.in_mask = out_mask, in_mask
        self._mask_versions = _version(out_mask), _version(in_mask)
        # A detached tensor counts its changes with the one that it came from.
        self._sources = tuple((name, tensor.detach(), _version(tensor)) for name, tensor in given if tensor is not None)
        self._rows, self._cols = self._gather_of(out_mask, pad_to), self._gather_of(in_mask, pad_to)
        self.kept_out = self.out_features if self._rows is None else self._rows.count
        self.kept_in = self.in_features if self._cols is None else self._cols.count
        self._weight = weight.detach()
        self.quantized = isinstance(weight, QuantizedWeight)
        self._take_sides()
        whole = self._rows is None and self._cols is None and not self.quantized
        self._held = self._weight if whole else None
        self._zeroed: KeptSlice | None = None

    def __repr__(self) -> str:
        kept = f"kept {self.kept_out}/{self.out_features} x {self.kept_in}/{self.in_features}"
        return f"KeptSlice({kept}, {self.dtype}, {self.device})"

    def __getstate__(self) -> dict[str, object]:
        """For a copy, whose tensors count changes anew: which of them are unchanged, in place of their versions."""
        masks = tuple(map(_version, (self.out_mask, self.in_mask)))
        sources = tuple((name, tensor, _version(tensor) == version) for name, tensor, version in self._sources)
        return self.__dict__ | {"_sources": sources, "_mask_versions": masks == self._mask_versions}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        masks = _version(self.out_mask), _version(self.in_mask)
        self._mask_versions = masks if self._mask_versions else (_CHANGED, _CHANGED)
        self._sources = tuple((name, t, _version(t) if unchanged else _CHANGED) for name, t, unchanged in self._sources)

    def fits(self, out_mask: Tensor | KeptFirst | None, in_mask: Tensor | KeptFirst | None) -> bool:
        """Whether these are the masks that the slice was made for, on the same device and in the same order.

        None does once the slice's own changed in place.
        """
        if (_version(self.out_mask), _version(self.in_mask)) != self._mask_versions:
            return False
        return _same(self.out_mask, out_mask) and _same(self.in_mask, in_mask)

    @property
    def share(self) -> float:
        """The share of the weight that is kept; 1.0 of an empty one."""
        return self.kept_out * self.kept_in / max(1, self.out_features * self.in_features)

    @property
    def zeroed(self) -> "KeptSlice":
        """The same for whole products: what lies in the model's order is not cut, and zero where it is removed.

        Nothing of activations is gathered for it, and all of the weight is multiplied. It is made at the first use,
        holds a copy as large as the weight, and waits for no device. Values of removed inputs are multiplied by zero,
        so NaN among them reaches the result.
        """
        if self._zeroed is None:
            made = copy.copy(self)
            made._rows, made._cols = (gather and gather.zeroed() for gather in (self._rows, self._cols))
            made._take_sides()
            made._held = None
            self._zeroed = made
        return self._zeroed

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The kept part [N", K"] in this dtype, gathered unless it is there; of a quantised weight, anew each time.

        Raises RuntimeError for a weight or bias that changed since, and where a compiler would have to trace the
        gathering or a CUDA graph to capture it.
        """
        if not torch.compiler.is_compiling():
            self._check_unchanged()
        if isinstance(self._weight, QuantizedWeight):
            refuse_training(self._weight)
            return _gathered(self._weight.to(dtype), self._rows, self._cols)
        if self._held is not None and self._held.dtype == dtype:
            return self._held
        if torch.compiler.is_compiling() or checks.is_capturing(self.device):
            advice = f"call weight({dtype}) before compiling or capturing a CUDA graph"
            raise RuntimeError(f"this KeptSlice holds no {dtype} weight: {advice}.")
        self._held = _gathered(self._weight, self._rows, self._cols).to(dtype)
        return self._held

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The kept part [N"] of the bias in this dtype."""
        return None if self._bias is None else self._bias.to(dtype)

    def _take_sides(self) -> None:
        """What the products must know of the two sides, and the bias."""
        outs, ins = (None if gather is None else gather.side for gather in (self._rows, self._cols))
        self.sides: tuple[Side | None, Side | None] = outs, ins  # how outputs and inputs relate to the slice
        bias = next((tensor for name, tensor, _ in self._sources if name == "bias"), None)
        self._bias = None if bias is None else _gathered(bias.unsqueeze(1), self._rows, None).squeeze(1)

    def _check_unchanged(self) -> None:
        """Asks the host alone, so that no device is waited for."""
        for name, tensor, version in self._sources:
            if _version(tensor) != version:
                raise RuntimeError(self._changed.format(name))

    _changed = "the {} of this KeptSlice changed in place after it was made: make a new slice."

    def _gather_of(self, mask: Tensor | KeptFirst | None, pad_to: int) -> "_Gather | None":
        gather = _Gather.of(mask, pad_to)
        return None if gather is None else gather.to(self.device)


class CallSlice(KeptSlice):
    """The slice of one call with bool masks, which reads its weight anew and holds it in no pass but the running one.

    Where looking at a mask waits for the device, an unchanged mask is looked at once and remembered for as long as it
    lives. torch counts no changes through `.data`, and none of inference tensors, which are looked at every time.
    """

    _changed = "the {} of a masked LoRA linear changed in place before its backward pass: change it after that."

    def release(self) -> None:
        """Drop the gathered weight; the next use gathers it again."""
        if self._rows is not None or self._cols is not None:
            self._held = None

    def _gather_of(self, mask: Tensor | KeptFirst | None, pad_to: int) -> "_Gather | None":
        if isinstance(mask, Tensor) and mask.device.type != "cpu":
            return remembered(mask, pad_to)
        return super()._gather_of(mask, pad_to)


def count_kept(mask: Tensor, pad_to: int = 32) -> int:
    """How many positions a bool mask keeps; for what a `CallSlice` then needs no device is waited for again."""
    if mask.device.type == "cpu":
        return int(mask.count_nonzero())
    gather = remembered(mask, pad_to)
    return mask.numel() if gather is None else gather.count


def remembered(mask: Tensor, pad_to: int) -> "_Gather | None":
    """`_Gather.of` an unchanged mask, made once."""
    version, found = _version(mask), _REMEMBERED.get(mask)
    if version is None:
        return _Gather.of(mask, pad_to)
    if found is None or found[:2] != (version, pad_to):
        found = _REMEMBERED[mask] = version, pad_to, _Gather.of(mask, pad_to)
    return found[2]


@dataclass(frozen=True)
class _Gather:
    """How one side of the weight becomes that of the slice.

    count: kept positions. index [width]: what the slice takes, None for the whole side. silent: the positions of the
    slice whose weight is zero. side: what the product must know, None where the whole side lies in the slice as it is.
    """

    count: int
    index: Tensor | None
    silent: Tensor
    side: Side | None

    @classmethod
    def of(cls, mask: Tensor | KeptFirst | None, pad_to: int) -> "_Gather | None":
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

    def zeroed(self) -> "_Gather":
        """This without a cut in the model's order: zeros take the place of what is removed. It waits for no device."""
        if self.index is None or self.side is None or self.side.kept_first:
            return self
        # Removed positions read the first filler. Their number is known, so that nobody has to ask the device.
        removed = (self.side.place == self.count).to(torch.uint8)
        silent = removed.argsort(descending=True, stable=True)[: removed.numel() - self.count]
        return _Gather(self.count, None, silent, None)

    def to(self, device: torch.device) -> "_Gather":
        """This on a device; from the host nobody waits for it."""
        if self.silent.device == device:
            return self
        if self.index is None or self.side is None:  # a side that lies in the slice as it is
            return replace(self, silent=upload((self.silent,), device)[0])
        index, silent, place = upload((self.index, self.silent, self.side.place), device)
        return _Gather(self.count, index, silent, Side(index, place, self.side.kept_first))


_CHANGED = -1
"""The version of what had changed before it was copied, which no tensor has."""
_REMEMBERED: MutableMapping[Tensor, tuple[int, int, _Gather | None]] = WeakTensorKeyDictionary()
"""Masks on devices that are waited for, each with its version, the padding and what was made of it."""


def _gathered(matrix: Tensor, rows: _Gather | None, cols: _Gather | None) -> Tensor:
    """The slice of a matrix, in floating point; the matrix itself where nothing is removed."""
    indices = (None if side is None else side.index for side in (rows, cols))
    if isinstance(matrix, QuantizedWeight):
        kept = matrix.kept(*indices).dequantize()
    elif rows is None and cols is None:
        return matrix
    else:
        kept = select("compact", matrix.device, matrix.dtype).module.compact(matrix, *indices)
    for axis, gather in enumerate((rows, cols)):
        if gather is not None:
            kept.index_fill_(axis, gather.silent, 0)
    return kept


def _version(tensor: Tensor | KeptFirst | None) -> int | None:
    """How often a tensor was changed in place, None where torch does not count.

    `Tensor._version` is what torch's own error about changed saved tensors prints; it has no public name.
    """
    if isinstance(tensor, KeptFirst):
        return _version(tensor.mask)
    return None if tensor is None or tensor.is_inference() else tensor._version


def _same(old: Tensor | KeptFirst | None, new: Tensor | KeptFirst | None) -> bool:
    if old is None or new is None or old is new:
        return old is new
    if isinstance(old, KeptFirst) and isinstance(new, KeptFirst):
        if _version(new) != new._mask_version:
            return False
        old, new = old.mask, new.mask
    if isinstance(old, KeptFirst) or isinstance(new, KeptFirst):
        return False
    return old.device == new.device and torch.equal(old, new)


def _refuse_capture(device: torch.device) -> None:
    checks.refuse_capture(device, "the making of a KeptFirst or KeptSlice, which the host does", "make it before")


def _check_padding(pad_to: int) -> None:
    if pad_to < 1:
        raise ValueError(f"pad_to is {pad_to}: give a positive multiple, 1 for no padding.")


def _check_slice(
    weight: Tensor, bias: Tensor | None, out_mask: Tensor | KeptFirst | None, in_mask: Tensor | KeptFirst | None
) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a 2-D floating tensor, not {weight.dtype} of shape {list(weight.shape)}.")
    n_out, n_in = weight.shape
    for name, given, size in (("bias", bias, n_out), ("out_mask", out_mask, n_out), ("in_mask", in_mask, n_in)):
        tensor = given.index if isinstance(given, KeptFirst) else given
        if tensor is None:
            continue
        on_host = name != "bias" and isinstance(given, Tensor) and tensor.device.type == "cpu"
        if tensor.shape != (size,) or not (on_host or tensor.device == weight.device):
            has = f"shape {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} has {has}, but weight {list(weight.shape)} needs [{size}] on {weight.device}.")
        if name != "bias" and given is tensor and tensor.dtype != torch.bool:
            raise ValueError(f"{name} is {tensor.dtype}: a slice takes a bool mask, masked_lora_linear a soft one.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient and a slice is frozen: freeze it or use masked_lora_linear.")
