"""What a LoRA linear on a kept slice reads, saves and returns, by name; operands checked and cast before a call."""

from typing import NamedTuple

from torch import Tensor

from atp_kernels.call import autocast_dtype
from atp_kernels.kept.sides import Side
from atp_kernels.kept.slices import KeptSlice


class Operands(NamedTuple):
    """A call: x [..., in], for backends [M, in]; weight [N", K"] and bias [N"] of the slice; the rest as it is given.

    x, lora_input and the result lie in the order of their sides, the factors in the order of the model.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    lora_input: Tensor | None
    outs: Side | None
    ins: Side | None
    scaling: float


class Saved(NamedTuple):
    """What a backward pass reads; None for what the wanted gradients do not need. s = scaling * lora_input A^T."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    adapter_input: Tensor | None
    s: Tensor | None
    outs: Side | None
    ins: Side | None
    scaling: float


class Needs(NamedTuple):
    """Which operands want a gradient. shared_input: the adapter read x."""

    x: bool
    lora_a: bool
    lora_b: bool
    lora_input: bool
    shared_input: bool = True


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Those of x, lora_a, lora_b and lora_input; None where none is wanted."""


def prepare(
    x: Tensor, kept: KeptSlice, lora_a: Tensor, lora_b: Tensor, lora_input: Tensor | None
) -> tuple[Tensor, KeptSlice, Tensor, Tensor, Tensor | None]:
    """Check the arguments and cast them as autocast and the dtype rules ask."""
    _check(x, kept, lora_a, lora_b, lora_input)
    dtype = autocast_dtype(x)
    if dtype is None:
        dtype = x.dtype
        if kept.dtype != dtype:
            raise ValueError(f"the slice is {kept.dtype} and x is {dtype}: cast one of them, or use autocast.")
    lora_input = None if lora_input is None or lora_input is x else lora_input.to(dtype)
    # Asked first, because a `to` that does nothing is a call into ATen all the same.
    if not x.dtype == lora_a.dtype == lora_b.dtype == dtype:
        x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    return x, kept, lora_a, lora_b, lora_input


def _check(x: Tensor, kept: KeptSlice, lora_a: Tensor, lora_b: Tensor, lora_input: Tensor | None) -> None:
    n_out, n_in = kept.out_features, kept.in_features
    if x.ndim == 0 or x.shape[-1] != n_in:
        raise ValueError(f"x has shape {list(x.shape)}, but the weight [{n_out}, {n_in}] needs [..., {n_in}].")
    if lora_a.ndim != 2:
        raise ValueError(f"lora_a has shape {list(lora_a.shape)}, but the weight needs [r, {n_in}].")
    rank = lora_a.shape[0]
    expected = (
        ("x", x, x.shape),
        ("lora_a", lora_a, (rank, n_in)),
        ("lora_b", lora_b, (n_out, rank)),
        ("lora_input", lora_input, x.shape),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but the weight and x need {list(shape)}.")
        if tensor.device != kept.device:
            raise ValueError(f"{name} is on {tensor.device} and the slice on {kept.device}: move them to one device.")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: give a floating tensor.")
