"""The mathematics of a kept slice: the base product on the kept rows and columns, LoRA on the whole width.

Composed ATen calls for any device and dtype; the products are the vendor's.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atp_kernels.backends.primitives import scaled_mm

_FEW_ROWS = 16
_LEAST_ROWS = 128
_ROWS_OF_16_BITS = 512
_BLOCK_ELEMENTS = 2**17


class Side(NamedTuple):
    """Where the positions of one whole side lie in the slice; None instead of a Side where nothing is removed.

    kept_first=False: the whole side keeps its order. index [width] holds the kept positions, then fillers whose weight
    is zero; place [size] tells where each position lies in the slice, and sends the removed ones to a filler.
    kept_first=True: the whole side is permuted, the slice is its head. index [size] lists the positions in their new
    order, place [size] is the inverse permutation.
    """

    index: Tensor
    place: Tensor
    kept_first: bool


def kept_lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_input: Tensor | None,
    outs: Side | None,
    ins: Side | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Return (y [M, out], S [M, r]) for x [M, in] and the slice's weight [N", K"] and bias [N"].

    x, lora_input and y lie in the order of their sides, the factors in the order of the model. S = scaling *
    lora_input A^T.
    """
    down = scaled_mm(x if lora_input is None else lora_input, _ordered(lora_a, ins, 1).t(), scaling)
    # Backward needs room for d_x; what is gathered of x takes less of it, while d_x is not there yet.
    spare = x.numel()
    return _product(x, weight.t(), bias, ins, outs, down, _ordered(lora_b, outs, 0).t(), spare), down


def kept_lora_linear_backward(
    grad_y: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_input: Tensor | None,
    down: Tensor | None,
    outs: Side | None,
    ins: Side | None,
    scaling: float,
    shared_input: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, lora_a, lora_b, lora_input), None where `needs` is False.

    `shared_input` says that the adapter read x. What `needs` makes useless may be None.
    """
    need_x, need_a, need_b, need_adapter = needs
    d_x = d_a = d_b = d_adapter = up = None
    permuted = outs is not None and outs.kept_first
    lora_a = _ordered(lora_a, ins, 1)
    if need_b and permuted:
        d_b = _restored(grad_y.t() @ down, outs, 0)
    if need_a or need_adapter or (need_x and shared_input):
        up = scaled_mm(grad_y, _ordered(lora_b, outs, 0), scaling)
    if need_x:
        # Until d_x is there, the factors' gradients lend it the room that they will take.
        spare = need_a * lora_a.numel() + need_b * lora_b.numel()
        d_x = _product(grad_y, weight, None, outs, ins, up if shared_input else None, lora_a, spare)
    if need_adapter:
        d_adapter = up @ lora_a
    del lora_a
    if need_a:
        d_a = _restored(up.t() @ adapter_input, ins, 1)
    if need_b and not permuted:
        d_b = grad_y.t() @ down
    return d_x, d_a, d_b, d_adapter


def _product(
    values: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    source: Side | None,
    target: Side | None,
    low: Tensor | None,
    high: Tensor,
    spare: int,
) -> Tensor:
    """values matrix + bias on the kept part plus low high on the whole width, in the order of the target side.

    On a CPU no more than `spare` elements live beside the result, or as many as sixteen rows have.
    """
    width = matrix.shape[1]
    result = values.new_empty(values.shape[0], width if target is None else target.place.shape[0])
    head, tail = result[:, :width], result[:, width:]
    if source is None or source.kept_first:
        _multiply(values[:, : matrix.shape[0]], matrix, bias, head)
    else:
        _gather_and_multiply(values, source.index, matrix, bias, result, spare)
    if target is None or not target.kept_first:
        if target is not None:
            _spread_(result, width, target.place, spare)
        return result if low is None else result.addmm_(low, high)
    if low is None:
        tail.zero_()
    else:
        head.addmm_(low, high[:, :width])
        torch.mm(low, high[:, width:], out=tail)
    return result


def _multiply(values: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = values matrix + bias."""
    n = values.shape[0]
    # In bfloat16 oneDNN takes up to 3 MiB for the product of 1024 rows and 0.4 MiB for 512, in the same time.
    step = _ROWS_OF_16_BITS if values.element_size() == 2 and values.device.type == "cpu" else max(1, n)
    for rows, target in zip(values.split(step), out.split(step), strict=True):
        if bias is None:
            torch.mm(rows, matrix, out=target)
        else:
            torch.addmm(bias, rows, matrix, out=target)


def _gather_and_multiply(
    values: Tensor, index: Tensor, matrix: Tensor, bias: Tensor | None, result: Tensor, spare: int
) -> None:
    """Write values[:, index] matrix + bias to the head of every row of `result`.

    Where `spare` is too little, a chunk of rows is gathered into rows of `result` that come later, then a chunk of
    those, and so on while that leaves chunks worth a product. The last rows go through scratch memory: all of them a
    few columns at a time, or, since 16 bits would round the sum every time, a few of them at a time.
    """
    (n, size), (width, n_out) = result.shape, matrix.shape
    room = min(_room(values, width, spare), n * width)
    scratch = values.new_empty(room)
    sums_in_place = values.element_size() > 2
    least = _LEAST_ROWS if sums_in_place else room // width
    start = 0
    while start < n:
        left, step, memory = n - start, width, scratch
        count = left * size // (size + width)
        if left * width <= room:
            count = left
        elif count > least:
            memory = result[start + count :].view(-1)
        elif sums_in_place:
            count, step = left, max(1, room // left)
        else:
            count = math.ceil(left / math.ceil(left * width / room))
        rows = slice(start, start + count)
        out = result[rows, :n_out]
        for first in range(0, width, step):
            part = index[first : first + step]
            gathered = memory[: count * len(part)].view(count, len(part))
            _take(values[rows], part, gathered)
            if first == 0:
                _multiply(gathered, matrix[:step], bias, out)
            else:
                out.addmm_(gathered, matrix[first : first + step])
        start += count


def _spread_(result: Tensor, width: int, place: Tensor, spare: int) -> None:
    """Every row from its head of this width to the whole, in place: column j takes what the head has at place[j]."""
    rows = _room(result, width, min(spare, _BLOCK_ELEMENTS)) // width
    for block in result.split(max(1, rows)):
        # Spreading is a gather too, so that every element has one writer.
        _take(block[:, :width].clone(), place, block)


def _room(values: Tensor, width: int, spare: int) -> int:
    """Elements of scratch memory for rows of this width: on a GPU, where launches cost more, enough for all rows."""
    return max(spare, _FEW_ROWS * width) if values.device.type == "cpu" else values.shape[0] * width


def _take(values: Tensor, index: Tensor, out: Tensor) -> None:
    """out = values[:, index]."""
    if values.element_size() == 2:
        # ATen makes a float32 copy of all that it gathers from 16-bit floats; the bits alone need none.
        values, out = values.view(torch.int16), out.view(torch.int16)
    # On a CPU `gather` took 1.3 ms where `index_select` took 5.7 ms (2432 of 1024 x 4096 in bfloat16, two threads).
    torch.gather(values, 1, index.expand(values.shape[0], -1), out=out)


def _ordered(factor: Tensor, side: Side | None, axis: int) -> Tensor:
    """A factor's rows or columns in the order of the side."""
    return factor if side is None or not side.kept_first else factor.index_select(axis, side.index)


def _restored(factor: Tensor, side: Side | None, axis: int) -> Tensor:
    """The inverse of `_ordered`."""
    return factor if side is None or not side.kept_first else factor.index_select(axis, side.place)
