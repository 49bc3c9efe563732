"""What a linear and a gated MLP do around their matrix products, in plain ATen; a backend may have its own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from atp_kernels import reference
from atp_kernels.reference import Dropout

ACTIVATIONS = {
    "silu": (torch.ops.aten.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (
        partial(torch.ops.aten.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}
"""Each activation and its gradient as ATen has them: called with (pre-activation) and, where there is a place for the
result, `out`; with (gradient, pre-activation) and `grad_input`."""

BLOCK_ELEMENTS = 2**17
"""What stays in a CPU's cache between two passes over it."""


def scaled_mm(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * (left @ right), rounded once."""
    if scaling == 1:
        return torch.mm(left, right)
    unread = left.new_empty(left.shape[0], right.shape[1])
    return unread.addmm_(left, right, beta=0, alpha=scaling)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right, for nothing where the adapter has a rank of 0: it is part of the weight."""
    return total.addmm_(left, right) if left.shape[1] else total


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """values * mask in the dtype of `values`; `values` itself when there is no mask."""
    if mask is None:
        return values
    result = torch.empty_like(values)
    for source, target in zip(_blocks(values, mask), _blocks(result, mask), strict=True):
        torch.mul(source, mask, out=target)
    return result


def mask_(values: Tensor, mask: Tensor | None) -> Tensor:
    """`masked` in place."""
    for block in () if mask is None else _blocks(values, mask):
        block.mul_(mask)
    return values


def column_dot(left: Tensor, right: Tensor) -> Tensor:
    """Column sums of left * right, in float32 or better."""
    total = torch.zeros(left.shape[1], dtype=torch.promote_types(left.dtype, torch.float32), device=left.device)
    for some, others in zip(_blocks(left, total), _blocks(right, total), strict=True):
        total += (some.to(total.dtype) * others).sum(0)
    return total


def mask_and_dot(grad: Tensor, total: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`masked(grad, mask)` and `column_dot(grad, total)`: what the decision step's backward reads both tensors for."""
    return masked(grad, mask), column_dot(grad, total)


def dropped(values: Tensor, dropout: Dropout) -> Tensor:
    """`reference.dropped`, with its random words in blocks of rows that stay in cache."""
    result = torch.empty_like(values)
    step = max(1, BLOCK_ELEMENTS // max(1, values.shape[1]))
    for first in range(0, values.shape[0], step):
        rows = slice(first, first + step)
        result[rows] = reference.dropped(values[rows], dropout, first)
    return result


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up of 2-D tensors, whose rows may lie apart."""
    return ACTIVATIONS[activation][0](gate).mul_(up)


def gated_backward(activation: str, d_h: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Write d_h * up * act'(gate) to d_gate, which may be d_h, and d_h * act(gate) to d_up; d_h is lost either way."""
    forward, backward = ACTIVATIONS[activation]
    forward(gate, out=d_up).mul_(d_h)
    backward(d_h.mul_(up), gate, grad_input=d_gate)


def take_columns(values: Tensor, index: Tensor, out: Tensor) -> None:
    """out = values[:, index], for 2-D tensors that share no memory; their rows may lie apart."""
    if values.element_size() == 2:
        # ATen makes a float32 copy of all that it gathers from 16-bit floats; bits alone need none.
        values, out = values.view(torch.int16), out.view(torch.int16)
    # On a CPU `gather` took 1.3 ms where `index_select` took 5.7 ms (2432 of 1024 x 4096 in bfloat16, two threads).
    torch.gather(values, 1, index.expand(values.shape[0], -1), out=out)


def spread_columns_(values: Tensor, width: int, place: Tensor, rows: int) -> None:
    """values = values[:, :width][:, place], in place, through a copy of this many rows of the head at a time."""
    for block in values.split(max(1, rows)):
        # Spreading is a gather too, so that every element has one writer.
        take_columns(block[:, :width].clone(), place, block)


def _blocks(values: Tensor, operand: Tensor) -> Sequence[Tensor]:
    """`values` in blocks of rows that stay in cache where ATen would make a wide copy of all of it.

    On a CPU, 16-bit values times a float32 mask took 5.3 ms whole and 0.6 ms in blocks (768 x 1536, one thread).
    """
    if values.device.type != "cpu" or operand.dtype in (torch.bool, values.dtype):
        return (values,)
    return values.split(max(1, BLOCK_ELEMENTS // max(1, values.shape[1])))


class Primitives(NamedTuple):
    """Each is called as the function of its name in this module, and returns what that returns."""

    masked: Callable[[Tensor, Tensor | None], Tensor] = masked
    mask_: Callable[[Tensor, Tensor | None], Tensor] = mask_
    column_dot: Callable[[Tensor, Tensor], Tensor] = column_dot
    mask_and_dot: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = mask_and_dot
    dropped: Callable[[Tensor, Dropout], Tensor] = dropped
    take_columns: Callable[[Tensor, Tensor, Tensor], None] = take_columns
    spread_columns_: Callable[[Tensor, int, Tensor, int], None] = spread_columns_


ATEN = Primitives()
