"""The LoRA linear on a kept slice on a CPU: gathers in C++ (csrc/cpu/take.cpp) around the products of the vendor."""

from functools import partial

from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call
from atp_kernels.kept import aten


def supports(call: Call) -> str | None:
    """float32 and bfloat16 on a CPU."""
    return extension.refuses(call)


def take_columns(values: Tensor, index: Tensor, out: Tensor) -> None:
    """`aten.take_columns` of elements of 1 to 8 bytes. Raises RuntimeError for an index out of range."""
    if values.stride(1) == 1 == out.stride(1):
        extension.ops.take_columns(values, index, out)
    else:
        aten.take_columns(values, index, out)


def spread_columns_(values: Tensor, width: int, place: Tensor, rows: int) -> None:
    """`aten.spread_columns_`, as `take_columns`, through one row per thread, however many rows are allowed."""
    extension.ops.spread_columns_(values, width, place)


_PRIMITIVES = aten.Primitives(take_columns, spread_columns_)
forward = partial(aten.forward, primitives=_PRIMITIVES)
backward = partial(aten.backward, primitives=_PRIMITIVES)
