"""The LoRA linear on a kept slice: the vendor's products of the kept part, and of the adapter on the whole width.

It runs on any device and in any dtype; a backend's `Primitives` gather around the products.
"""

# Which of the saved tensors are None follows from `needs`, which a type checker cannot see.
# mypy: disable-error-code="union-attr,operator,arg-type,assignment"

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from atp_kernels.call import Call
from atp_kernels.kept.operands import Gradients, Needs, Operands, Saved
from atp_kernels.kept.sides import Side
from atp_kernels.linear.aten import scaled_mm, sum_of_products

_FEW_ROWS = 16  # of scratch memory at least
_LEAST_ROWS = 256  # that a product of their own is worth: it reads the whole weight again
_ROWS_OF_16_BITS = 512
_BLOCK_ELEMENTS, _PART_ELEMENTS = 2**17, 2**13  # of activations, of a factor: that stay in cache


def supports(call: Call) -> str | None:
    """Every call."""
    return None


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


def product(
    values: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    source: Side | None,
    target: Side | None,
    low: Tensor | None,
    high: Tensor,
    spare: int,
    primitives: "Primitives",
) -> Tensor:
    """values matrix + bias on the kept part plus low high on the whole width, in the order of the target side.

    On a CPU no more than `spare` elements live beside the result at a time, or as many as a few rows have.
    """
    on_cpu, width = _on_cpu(values), matrix.shape[1]
    spreads = target is not None and not target.kept_first
    size = width if target is None or (spreads and not on_cpu) else target.place.shape[0]
    result = values.new_empty(values.shape[0], size)
    head, tail = result[:, :width], result[:, width:]
    gathers = source is not None and not source.kept_first
    # What is spread is the base alone, and rows of the result that a CPU gathers into hold no sum yet.
    together = low is not None and not spreads and not (gathers and on_cpu)
    adapter = (low, high[:, :width]) if together else (None, high)
    if not gathers:
        _multiply(values[:, : matrix.shape[0]], matrix, bias, head, *adapter)
    elif on_cpu:
        _gather_and_multiply(values, source.index, matrix, bias, result, spare, primitives)
    else:
        _multiply(_columns(values, source.index, primitives), matrix, bias, head, *adapter)
    if target is None or spreads:
        if spreads and on_cpu:
            rows = max(_FEW_ROWS, min(spare, _BLOCK_ELEMENTS) // width)
            primitives.spread_columns_(result, width, target.place, rows)
        elif spreads:
            result = _columns(result, target.place, primitives)
        return result if low is None or together else result.addmm_(low, high)
    if low is None:
        tail.zero_()
        return result
    if not together:
        head.addmm_(low, high[:, :width])
    torch.mm(low, high[:, width:], out=tail)
    return result


class Primitives(NamedTuple):
    """Each is called as the function of its name in this module; another backend may have its own."""

    take_columns: Callable[[Tensor, Tensor, Tensor], None] = take_columns
    spread_columns_: Callable[[Tensor, int, Tensor, int], None] = spread_columns_
    product: Callable[..., Tensor] = product


ATEN = Primitives()


def forward(operands: Operands, *, primitives: Primitives = ATEN) -> tuple[Tensor, Tensor]:
    """(y [M, out], S [M, r]) with S = scaling * lora_input A^T."""
    x, weight, bias, lora_a, lora_b, lora_input, outs, ins, scaling = operands
    s = scaled_mm(x if lora_input is None else lora_input, ordered(lora_a, ins, 1).t(), scaling)
    spare = x.numel()  # backward will take as much for d_x
    lora_b = ordered(lora_b, outs, 0)
    return primitives.product(x, weight.t(), bias, ins, outs, s, lora_b.t(), spare, primitives), s


def backward(grad_y: Tensor, saved: Saved, needs: Needs, *, primitives: Primitives = ATEN) -> Gradients:
    """The wanted gradients."""
    weight, lora_a, lora_b, adapter_input, s, outs, ins, scaling = saved
    need_x, need_a, need_b, need_adapter, shared_input = needs
    d_x = d_a = d_b = d_adapter = up = None
    lora_a = ordered(lora_a, ins, 1)
    if need_a or need_adapter or (need_x and shared_input):
        up = scaled_mm(grad_y, ordered(lora_b, outs, 0), scaling)
    if need_x:
        # It needs room, so the gradients of the factors come after it: as much as they will take is free.
        spare = need_a * lora_a.numel() + need_b * lora_b.numel()
        low = up if shared_input else None
        d_x = primitives.product(grad_y, weight, None, outs, ins, low, lora_a, spare, primitives)
    if need_adapter:
        d_adapter = up @ lora_a
    del lora_a
    if need_a:
        d_a = up.t() @ adapter_input
        if ins is not None and ins.kept_first:
            rows = max(1, _PART_ELEMENTS // d_a.shape[1]) if _on_cpu(d_a) else d_a.shape[0]
            primitives.spread_columns_(d_a, d_a.shape[1], ins.place, rows)
    if need_b:
        d_b = in_order(grad_y.t() @ s, outs)
    return d_x, d_a, d_b, d_adapter


def _multiply(
    values: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    out: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> None:
    """out = values matrix + bias + low high."""
    n = values.shape[0]
    # In bfloat16 oneDNN takes up to 3 MiB for a product of 1024 rows, 0.4 MiB for one of 512, and the same time.
    step = _ROWS_OF_16_BITS if values.element_size() == 2 and _on_cpu(values) else max(1, n)
    blocks = values.split(step)
    lows = [None] * len(blocks) if low is None else low.split(step)
    for rows, target, own in zip(blocks, out.split(step), lows, strict=True):
        sum_of_products(rows, matrix, own, high, bias, out=target)


def _gather_and_multiply(
    values: Tensor,
    index: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    result: Tensor,
    spare: int,
    primitives: Primitives,
) -> None:
    """Write values[:, index] matrix + bias to the head of every row of `result`.

    Where `spare` is too little for all, rows of `result` that are not written yet hold what is gathered for those
    before them, and then for some of their own, until that would be few. The rest goes through scratch memory: all of
    its rows, some columns at a time, or, as 16 bits would round every sum of such parts, some rows at a time.
    """
    (n, size), (width, n_out) = result.shape, matrix.shape
    room = min(max(spare, _FEW_ROWS * width), n * width)
    scratch = values.new_empty(room)
    by_columns = values.element_size() > 2
    whole = max(1, room // width)  # rows that scratch memory holds
    least = _LEAST_ROWS if by_columns else whole
    start = 0
    while start < n:
        left, step, memory = n - start, width, scratch
        count = left * size // (size + width)
        if left * width <= room:
            count = left
        elif count > least:
            memory = result[start + count :].view(-1)
        elif by_columns:
            count = min(left, room)  # there may be less room than a column of all rows takes
            step = room // count
        else:
            count = math.ceil(left / math.ceil(left / whole))
        rows = slice(start, start + count)
        out = result[rows, :n_out]
        for first in range(0, width, step):
            part = index[first : first + step]
            gathered = memory[: count * len(part)].view(count, len(part))
            primitives.take_columns(values[rows], part, gathered)
            if first == 0:
                _multiply(gathered, matrix[:step], bias, out)
            else:
                out.addmm_(gathered, matrix[first : first + step])
        start += count


def _columns(values: Tensor, index: Tensor, primitives: Primitives) -> Tensor:
    """values[:, index]."""
    result = values.new_empty(values.shape[0], index.shape[0])
    primitives.take_columns(values, index, result)
    return result


def ordered(factor: Tensor, side: Side | None, axis: int) -> Tensor:
    """A factor's rows or columns in the order of the side."""
    return factor if side is None or not side.kept_first else factor.index_select(axis, side.index)


def in_order(d_b: Tensor, side: Side | None) -> Tensor:
    """The gradient of a B that was `ordered`, in the model's order; on a CPU in place, some columns at a time."""
    if side is None or not side.kept_first:
        return d_b
    if not _on_cpu(d_b):
        return d_b.index_select(0, side.place)
    for columns in d_b.split(max(1, _PART_ELEMENTS // max(1, d_b.shape[0])), 1):
        columns.copy_(columns.index_select(0, side.place))
    return d_b


def _on_cpu(values: Tensor) -> bool:
    """Whether memory is worth more than launches."""
    return values.device.type == "cpu"
