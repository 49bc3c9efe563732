"""A linear with its adapter under one name, as blocks of several linears take it."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from atp_kernels.kept import kept_lora_linear
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.linear import masked_lora_linear


class Projection(NamedTuple):
    """A linear with its LoRA factors: weight [out, in], lora_a [r, in], lora_b [out, r], bias [out].

    >>> q = Projection(torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), scaling=0.5)
    >>> q.bias is None
    True
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None


def project(
    x: Tensor,
    projection: Projection,
    kept: KeptSlice | None,
    *,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    mask_lora: bool,
    dropout: float,
    seed: int | Tensor | None,
    backend: str,
) -> Tensor:
    """`masked_lora_linear` of x, or `kept_lora_linear` where there is a slice."""
    weight, lora_a, lora_b, scaling, bias = projection
    if kept is not None:
        return kept_lora_linear(x, kept, lora_a, lora_b, scaling=scaling, dropout=dropout, seed=seed, backend=backend)
    return masked_lora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        scaling=scaling,
        out_mask=out_mask,
        in_mask=in_mask,
        mask_lora=mask_lora,
        bias=bias,
        dropout=dropout,
        seed=seed,
        backend=backend,
    )


def check_kept(kept: Sequence[KeptSlice] | None, masks: Sequence[Tensor | None], mask_lora: bool) -> None:
    """Raise ValueError for another number of slices than three, and for masks beside slices."""
    if kept is not None and len(kept) != 3:
        raise ValueError(f"kept has {len(kept)} of three slices: give one for each linear.")
    if kept is not None and (mask_lora or any(mask is not None for mask in masks)):
        raise ValueError(
            "kept slices bring their own masks, on the base path: give no mask and no mask_lora with them."
        )
