"""Which masked LoRA linears are computed as one packed product: short training steps on a CPU in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from atp_kernels.packed import PackedLinears, refuses
from atp_kernels.projection import Projection


class Packable(Protocol):
    """What a linear says of itself: a `MaskedPeftLinear`."""

    @property
    def packable(self) -> bool:
        """Whether this pass computes what a pack does."""

    @property
    def uncast(self) -> Projection:
        """The frozen base and its adapter as they are."""


class Packs:
    """The pack of linears that read one input, made when it is first asked for, and again when a weight changed.

    It stands for the casts of these weights.
    """

    def __init__(self) -> None:
        self._pack: PackedLinears | None = None

    def drop(self) -> None:
        """Gives the memory back."""
        self._pack = None

    def of(self, linears: Sequence[Packable], x: Tensor) -> tuple[PackedLinears, list[Projection]] | None:
        """(their pack, the linears as it takes them) where a training pass of x may use it; None elsewhere."""
        kind = x.device.type
        if kind != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != torch.bfloat16:
            return None
        if x.dtype == torch.float64 or not all(linear.packable for linear in linears):
            return None
        given = [linear.uncast for linear in linears]
        if self._pack is None or not self._pack.holds(given):
            self._pack = None if refuses(given) else PackedLinears(given)
        return None if self._pack is None else (self._pack, given)
