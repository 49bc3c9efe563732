"""The kept part of a frozen weight.

A row or column mask is a smaller dense matrix product. What is made here is made once per decision: host-side counts,
index vectors, and at the first use the gathered weight.
"""

import copy

import torch
from torch import Tensor

from atp_kernels import checks
from atp_kernels.call import select
from atp_kernels.kept.sides import (
    CHANGED,
    Gather,
    KeptFirst,
    Side,
    check_padding,
    check_values,
    into,
    refuse_capture,
    remembered,
    side_into,
    version_of,
)
from atp_kernels.kinds import typed
from atp_kernels.quantized import QuantizedWeight, refuse_training


class KeptSlice:
    """The kept rows and columns of a frozen base weight, made once per decision and read by many `kept_lora_linear`.

    weight [out, in] and bias [out]: floating, without gradient. out_mask [out], in_mask [in]: bool, True keeps, on the
    weight's device or on the host; None keeps all; or a `KeptFirst`, which says that outputs or inputs lie in its order
    and has its index on the weight's device. The slice is held from its first use, and gathered again for another
    dtype. Of a `QuantizedWeight` nothing is held: each use takes and dequantises the kept rows, since a floating slice
    would take back most of what quantising saves. pad_to: multiple to which kept counts of bool masks are padded
    (vendor GEMMs are slow on odd widths), never visible in results. Make a new slice when a mask or the weight changed:
    a weight or bias that did, in place, makes the next use raise RuntimeError. torch counts no changes through `.data`
    or of inference tensors, a compiled program does not look, and a parameter that takes the place of the weight in its
    module is another tensor. A copy of a module with its slice looks at the weight of the copy. Making one waits for
    the device of a bool mask, so for nothing where the mask lies on the host; using it never waits.
    reuse: an earlier slice, whose memory this one takes where it has the size. `same_memory` says whether all of this
    one lies there; a CUDA graph that was captured with the earlier slice then computes with this one. Every use of the
    earlier slice, and of others whose `KeptFirst` gave its memory away, raises RuntimeError from then on, a backward
    pass as well. Raises ValueError for wrong shapes, dtypes, devices or options.

    >>> weight = torch.arange(12.0).view(4, 3)
    >>> kept = KeptSlice(weight, out_mask=torch.tensor([True, False, False, False]), pad_to=1)
    >>> kept
    KeptSlice(kept 1/4 x 3/3, torch.float32, cpu)
    >>> kept.weight(torch.float32)  # and one row of zeros, which the removed outputs read
    tensor([[0., 1., 2.],
            [0., 0., 0.]])
    """

    @typed
    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        out_mask: Tensor | KeptFirst | None = None,
        in_mask: Tensor | KeptFirst | None = None,
        pad_to: int = 32,
        reuse: "KeptSlice | None" = None,
    ) -> None:
        _check_slice(weight, bias, out_mask, in_mask)
        check_padding(pad_to)
        refuse_capture(weight.device)
        given = ("weight", weight), ("bias", bias)
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.out_mask, self.in_mask = out_mask, in_mask
        self._mask_versions = version_of(out_mask), version_of(in_mask)
        # The tensors themselves: a copy of a module finds those of its own layers through them.
        self._sources = tuple((name, tensor, version_of(tensor)) for name, tensor in given if tensor is not None)
        self._rows, self._cols = self._gather_of(out_mask, pad_to), self._gather_of(in_mask, pad_to)
        self.kept_out = self.out_features if self._rows is None else self._rows.count
        self.kept_in = self.in_features if self._cols is None else self._cols.count
        self.quantized = isinstance(weight, QuantizedWeight)
        self._take_sides()
        self._held = None if self._gathers or self.quantized else self._weight
        self._zeroed: KeptSlice | None = None
        self._given_away = self.same_memory = False
        if reuse is not None and not reuse._given_away:
            self._take_memory(reuse)

    def __repr__(self) -> str:
        kept = f"kept {self.kept_out}/{self.out_features} x {self.kept_in}/{self.in_features}"
        return f"KeptSlice({kept}, {self.dtype}, {self.device})"

    def __getstate__(self) -> dict[str, object]:
        """For a copy, whose tensors count changes anew: which of them are unchanged, in place of their versions."""
        masks = tuple(map(version_of, (self.out_mask, self.in_mask)))
        sources = tuple(
            # What a change has put into a graph can be copied without it alone.
            (name, tensor if tensor.is_leaf else tensor.detach(), version_of(tensor) == version)
            for name, tensor, version in self._sources
        )
        return self.__dict__ | {"_sources": sources, "_mask_versions": masks == self._mask_versions}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        masks = version_of(self.out_mask), version_of(self.in_mask)
        self._mask_versions = masks if self._mask_versions else (CHANGED, CHANGED)
        self._sources = tuple(
            (name, t, version_of(t) if unchanged else CHANGED) for name, t, unchanged in self._sources
        )

    def fits(self, out_mask: Tensor | KeptFirst | None, in_mask: Tensor | KeptFirst | None) -> bool:
        """Whether these are the masks that the slice was made for, on the same device and in the same order.

        None does once the slice's own changed in place, or its memory went to a newer slice.
        """
        if self._given_away or (version_of(self.out_mask), version_of(self.in_mask)) != self._mask_versions:
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

    @property
    def holds_zeroed(self) -> bool:
        """Whether `zeroed` holds its weight, so that a CUDA graph that is captured can read it."""
        return self._zeroed is not None and self._zeroed._held is not None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The kept part [N", K"] in this dtype, gathered unless it is there; of a quantised weight, anew each time.

        Raises RuntimeError for a weight or bias that changed since, and where a compiler would have to trace the
        gathering or a CUDA graph to capture it.
        """
        if not torch.compiler.is_compiling():
            self._check_unchanged()
        if self.quantized:
            whole = self._weight
            refuse_training(whole)
            return _gathered(whole.to(dtype), self._rows, self._cols)
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

    @property
    def _weight(self) -> Tensor:
        """The whole weight."""
        return self._sources[0][1].detach()

    @property
    def _gathers(self) -> bool:
        """Whether the slice is less than the whole weight."""
        return self._rows is not None or self._cols is not None

    def _take_sides(self) -> None:
        """What the products must know of the two sides, and the bias."""
        outs, ins = (None if gather is None else gather.side for gather in (self._rows, self._cols))
        self.sides: tuple[Side | None, Side | None] = outs, ins  # how outputs and inputs relate to the slice
        bias = next((tensor.detach() for name, tensor, _ in self._sources if name == "bias"), None)
        self._bias = None if bias is None else _gathered(bias.unsqueeze(1), self._rows, None).squeeze(1)

    def _take_memory(self, old: "KeptSlice") -> None:
        """Takes what the old slice gathered, where it has the size, and never what belongs to the model."""
        (outs, one), (ins, other) = map(side_into, old.sides, self.sides)
        self.sides = outs, ins
        held = old._held
        if held is not None and not self.quantized:
            if old._gathers and self._gathers:
                self._held = into(held, _gathered(self._weight, self._rows, self._cols).to(held.dtype))
            self.same_memory = one and other and self.weight(held.dtype).data_ptr() == held.data_ptr()
        if self._bias is not None and old._bias is not None and old._rows is not None and self._rows is not None:
            self._bias = into(old._bias, self._bias)
        for slice_ in (old, old._zeroed):
            if slice_ is not None:
                slice_._given_away, slice_._held = True, None

    def _check_unchanged(self) -> None:
        """Asks the host alone, so that no device is waited for."""
        orders = (mask for mask in (self.out_mask, self.in_mask) if isinstance(mask, KeptFirst))
        if self._given_away or any(order.given_away for order in orders):
            raise RuntimeError("this KeptSlice gave its memory to a newer one: use that, after the backward pass.")
        for name, tensor, version in self._sources:
            if version_of(tensor) != version:
                raise RuntimeError(self._changed.format(name))

    _changed = "the {} of this KeptSlice changed in place after it was made: make a new slice."

    def _gather_of(self, mask: Tensor | KeptFirst | None, pad_to: int) -> "Gather | None":
        gather = Gather.of(mask, pad_to)
        return None if gather is None else gather.to(self.device)


class CallSlice(KeptSlice):
    """The slice of one call with bool masks, which reads its weight anew and holds it in no pass but the running one.

    Where looking at a mask waits for the device, an unchanged mask is looked at once and remembered for as long as it
    lives. torch counts no changes through `.data`, and none of inference tensors, which are looked at every time.
    """

    _changed = "the {} of a masked LoRA linear changed in place before its backward pass: change it after that."

    def release(self) -> None:
        """Drop the gathered weight; the next use gathers it again."""
        if self._gathers:
            self._held = None

    def _gather_of(self, mask: Tensor | KeptFirst | None, pad_to: int) -> "Gather | None":
        if isinstance(mask, Tensor) and mask.device.type != "cpu":
            return remembered(mask, pad_to)
        return super()._gather_of(mask, pad_to)


def _gathered(matrix: Tensor, rows: Gather | None, cols: Gather | None) -> Tensor:
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


def _same(old: Tensor | KeptFirst | None, new: Tensor | KeptFirst | None) -> bool:
    if old is None or new is None or old is new:
        return old is new
    if isinstance(old, KeptFirst) and isinstance(new, KeptFirst):
        if version_of(new) != new._mask_version:
            return False
        old, new = old.mask, new.mask
    if isinstance(old, KeptFirst) or isinstance(new, KeptFirst):
        return False
    return old.device == new.device and torch.equal(old, new)


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
        if name != "bias" and given is tensor:
            check_values(name, tensor)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient and a slice is frozen: freeze it or use masked_lora_linear.")
