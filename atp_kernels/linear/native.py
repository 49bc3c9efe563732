"""The masked LoRA linear on a CPU: the vendor's products, with masks, column sums and dropout in C++ around them.

The operators are in csrc/cpu/columns.cpp and csrc/cpu/merge.cpp.
"""

from functools import partial

from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call
from atp_kernels.dropout.native import dropped
from atp_kernels.linear import aten

ADDMM_CHAIN = True


def supports(call: Call) -> str | None:
    """float32 and bfloat16 on a CPU."""
    return extension.refuses(call)


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """`aten.masked` of 2-D values by a float32 or bool mask [columns]."""
    return values if mask is None else extension.ops.masked(values.contiguous(), mask.contiguous())


def mask_(values: Tensor, mask: Tensor | None) -> Tensor:
    """`aten.mask_`, as `masked`; the values must be contiguous."""
    if mask is not None:
        extension.ops.mask_(values, mask.contiguous())
    return values


def column_dot(left: Tensor, right: Tensor) -> Tensor:
    """`aten.column_dot`: float32 over blocks of 64 rows, float64 over the blocks."""
    return extension.ops.column_dot(left.contiguous(), right.contiguous())


def mask_and_dot(grad: Tensor, total: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`masked(grad, mask)` and `column_dot(grad, total)`, reading both once."""
    return extension.ops.mask_and_dot(grad.contiguous(), total.contiguous(), mask.contiguous())


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """weight + scaling * lora_b lora_a in bfloat16, summed in float32 and rounded once, for little more than a cast.

    weight float32 [out, in]; lora_a [r, in] and lora_b [out, r], used in float32.
    """
    held = (tensor.detach().float().contiguous() for tensor in (weight, lora_a, lora_b))
    return extension.ops.merged_weight(*held, scaling)


_PRIMITIVES = aten.Primitives(masked, mask_, column_dot, mask_and_dot, dropped)
forward = partial(aten.forward, primitives=_PRIMITIVES)
backward = partial(aten.backward, primitives=_PRIMITIVES)
