"""What a masked LoRA linear reads, saves and returns, by name; operands checked and cast before a call."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atp_kernels.call import autocast_dtype, select
from atp_kernels.dropout.definition import Dropout
from atp_kernels.quantized import QuantizedWeight, refuse_training

# The dtypes from which and to which a weight is cast and merged at once.
_NARROWED = (torch.float32, torch.bfloat16)


class Operands(NamedTuple):
    """The tensors of a call: x [..., in], for backends [M, in]; the others as in `masked_lora_linear`."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None = None
    lora_input: Tensor | None = None
    out_mask: Tensor | None = None
    in_mask: Tensor | None = None


class Options(NamedTuple):
    """What else decides the result. keep_sum: the sum before the output mask is wanted, for the mask's gradient."""

    scaling: float
    mask_lora: bool = False
    keep_sum: bool = False
    dropout: Dropout | None = None


class Results(NamedTuple):
    """What a forward pass returns: y [M, out] and s = scaling * lora_input A^T [M, r], and what the options ask for.

    total [M, out]: the sum before the output mask.
    """

    y: Tensor
    s: Tensor
    total: Tensor | None = None


class Saved(NamedTuple):
    """What a backward pass reads; None for what the wanted gradients do not need."""

    x: Tensor | None
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    lora_input: Tensor | None
    out_mask: Tensor | None
    in_mask: Tensor | None
    s: Tensor | None
    total: Tensor | None


class Needs(NamedTuple):
    """Which operands want a gradient. shared_input: the adapter read x, through dropout if there is one."""

    x: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool
    lora_input: bool
    out_mask: bool
    in_mask: bool
    shared_input: bool = True


Gradients = tuple[Tensor | None, ...]
"""One for every operand, in the order of `Operands`; None where none is wanted."""


def prepare(operands: Operands, *, merge: float | None = None, backend: str = "auto") -> Operands:
    """Check the operands and cast them as autocast and the dtype rules ask.

    `merge` is the scaling of an adapter that reads and feeds what the base does, None of another. Where autocast casts
    such a linear anyway and the adapter is constant, it becomes part of the weight on the way, if `backend` has a
    kernel for that, and factors of rank 0 stand for it.
    """
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask = operands
    if lora_input is x:
        lora_input = None
        operands = operands._replace(lora_input=None)
    refuse_training(weight)
    ready = _are_ready(*operands)
    if not ready:
        check(operands)
    dtype, cast = x.dtype, autocast_dtype(x)
    if cast is not None:
        dtype = cast
        x = x.to(dtype)
        merged = None
        if merge is not None and lora_input is None:
            merged = _merged(weight, lora_a, lora_b, merge, dtype, backend)
        weight, lora_a, lora_b = merged or (weight.to(dtype), lora_a, lora_b)
    elif ready:
        return operands
    elif weight.dtype != dtype:
        raise ValueError(f"weight is {weight.dtype} and x is {dtype}: cast one of them, or run under torch.autocast.")
    return Operands(
        x,
        weight,
        _cast(lora_a, dtype),
        _cast(lora_b, dtype),
        _cast(bias, dtype),
        _cast(lora_input, dtype),
        _as_mask(out_mask, dtype),
        _as_mask(in_mask, dtype),
    )


def _merged(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(weight + scaling * lora_b lora_a in `dtype`, factors of rank 0) of a constant adapter, None of another.

    None too where no kernel makes it at the cost of the cast, and for a compiler, which fuses casts by itself.
    """
    if torch.compiler.is_compiling() or weight.device.type != "cpu" or (weight.dtype, dtype) != _NARROWED:
        return None
    if isinstance(weight, QuantizedWeight):  # the merged one would be a floating copy that autograd keeps
        return None
    if torch.is_grad_enabled() and (weight.requires_grad or lora_a.requires_grad or lora_b.requires_grad):
        return None
    module = select("masked_lora_linear", weight.device, dtype, backend).module
    if not hasattr(module, "merged_weight"):
        return None
    return module.merged_weight(weight, lora_a, lora_b, scaling), lora_a[:0], lora_b[:, :0]


def check(operands: Operands) -> None:
    """Raise ValueError for a wrong shape, device or dtype."""
    x, weight, lora_a, lora_b, *_ = operands
    if weight.ndim != 2 or lora_a.ndim != 2 or lora_b.ndim != 2:
        raise ValueError("weight, lora_a and lora_b must be 2-D: [out, in], [r, in] and [out, r].")
    (n_out, n_in), rank = weight.shape, lora_a.shape[0]
    if x.ndim == 0 or x.shape[-1] != n_in:
        raise ValueError(f"x has shape {list(x.shape)}, but weight {list(weight.shape)} needs [..., {n_in}].")
    shapes = (x.shape, (n_out, n_in), (rank, n_in), (n_out, rank), (n_out,), x.shape, (n_out,), (n_in,))
    for name, tensor, shape in zip(Operands._fields, operands, shapes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but weight and x need {list(shape)}.")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device.")
        if not (tensor.is_floating_point() or (tensor.dtype == torch.bool and name.endswith("mask"))):
            kind = "bool or floating mask" if name.endswith("mask") else "floating tensor"
            raise ValueError(f"{name} is {tensor.dtype}: give a {kind}.")


def _are_ready(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask) -> bool:
    """Whether the operands need neither a cast nor a word from `check`, in as few comparisons as that takes.

    Eager code makes hundreds of calls per step, and nearly all of them pass here.
    """
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point or x.ndim == 0 or weight.ndim != 2 or lora_a.ndim != 2:
        return False
    (n_out, n_in), (rank, adapter_in) = weight.shape, lora_a.shape
    masks = (torch.bool, torch.float64 if dtype == torch.float64 else torch.float32)
    return (
        x.shape[-1] == n_in == adapter_in
        and lora_b.shape == (n_out, rank)
        and weight.dtype == lora_a.dtype == lora_b.dtype == dtype
        and weight.device == lora_a.device == lora_b.device == device
        and (bias is None or _is(bias, (n_out,), device, (dtype,)))
        and (lora_input is None or _is(lora_input, x.shape, device, (dtype,)))
        and (out_mask is None or _is(out_mask, (n_out,), device, masks))
        and (in_mask is None or _is(in_mask, (n_in,), device, masks))
    )


def _is(tensor: Tensor, shape: Sequence[int], device: torch.device, dtypes: tuple[torch.dtype, ...]) -> bool:
    return tensor.shape == shape and tensor.device == device and tensor.dtype in dtypes


def _cast(tensor, dtype: torch.dtype):
    # Asked first, because a `to` that does nothing is a call into ATen all the same.
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _as_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Hard masks stay bool; soft ones are used in float32 (float64 beside float64)."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.to(torch.float64 if dtype == torch.float64 else torch.float32)
