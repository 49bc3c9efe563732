"""The `native` backend: C++ operations from the optional extension atp_kernels._C.

Group operations take all factors of a model at once; the linear is the reference backend's around the vendor's matrix
products, with its masks, column sums, gathers and dropout in C++ (on a CPU), and so is SiLU between the linears of a
gated MLP.

Results do not depend on the number of threads or on the processor's instruction set. All functions are numerics only:
they record no gradient. Non-contiguous tensors are copied, and copied back where the operation works in place.
"""

from functools import partial

from torch import Tensor

from atp_kernels import extension
from atp_kernels.backends import aten, kept, primitives
from atp_kernels.backends.primitives import Primitives
from atp_kernels.call import Call
from atp_kernels.reference import Dropout

__all__ = [
    "dropped",
    "gated",
    "gated_backward",
    "kept_lora_linear_backward",
    "kept_lora_linear_forward",
    "masked_lora_linear_backward",
    "masked_lora_linear_forward",
    "merged_weight",
]


ADDMM_CHAIN = True


def supports(call: Call) -> str | None:
    return extension.refuses(call)


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """`primitives.masked` for 2-D float32 or bfloat16 values and a float32 or bool mask [columns]."""
    return values if mask is None else extension.ops.masked(values.contiguous(), mask.contiguous())


def mask_(values: Tensor, mask: Tensor | None) -> Tensor:
    """`primitives.mask_`, as `masked`; the values must be contiguous."""
    if mask is not None:
        extension.ops.mask_(values, mask.contiguous())
    return values


def column_dot(left: Tensor, right: Tensor) -> Tensor:
    """`primitives.column_dot`: float32 over blocks of 64 rows, float64 over the blocks."""
    return extension.ops.column_dot(left.contiguous(), right.contiguous())


def mask_and_dot(grad: Tensor, total: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`masked(grad, mask)` and `column_dot(grad, total)`, reading both once."""
    return extension.ops.mask_and_dot(grad.contiguous(), total.contiguous(), mask.contiguous())


def dropped(values: Tensor, dropout: Dropout) -> Tensor:
    """`reference.dropped`, to the last bit."""
    low, high = dropout.key
    seed = low | (high - (high >> 31 << 32)) << 32  # the same 64 bits as a signed integer
    return extension.ops.dropped(values.contiguous(), dropout.threshold, dropout.scale, seed)


def take_columns(values: Tensor, index: Tensor, out: Tensor) -> None:
    """`primitives.take_columns` of elements of 1 to 8 bytes. Raises RuntimeError for an index out of range."""
    if _unit_stride(values, out):
        extension.ops.take_columns(values, index, out)
    else:
        primitives.take_columns(values, index, out)


def spread_columns_(values: Tensor, width: int, place: Tensor, rows: int) -> None:
    """`primitives.spread_columns_`, as `take_columns`, through one row a thread, however many rows are allowed."""
    extension.ops.spread_columns_(values, width, place)


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """`primitives.gated`: SiLU of float32 or bfloat16 in one pass, computed in float32 and rounded once."""
    if activation != "silu" or not _unit_stride(gate, up):
        return primitives.gated(activation, gate, up)
    return extension.ops.swiglu_forward(gate, up)


def gated_backward(activation: str, d_h: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """`primitives.gated_backward`, as `gated`; this one leaves d_h as it was unless it is d_gate."""
    if activation != "silu" or not _unit_stride(d_h, gate, up, d_gate, d_up):
        primitives.gated_backward(activation, d_h, gate, up, d_gate, d_up)
    else:
        extension.ops.swiglu_backward(d_h, gate, up, d_gate, d_up)


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """weight + scaling * lora_b lora_a in bfloat16, summed in float32 and rounded once, for little more than a cast.

    On a CPU: weight float32 [out, in]; lora_a [r, in] and lora_b [out, r], used in float32.
    """
    held = (tensor.detach().float().contiguous() for tensor in (weight, lora_a, lora_b))
    return extension.ops.merged_weight(*held, scaling)


def _unit_stride(*matrices: Tensor) -> bool:
    return all(matrix.stride(1) == 1 for matrix in matrices)


_PRIMITIVES = Primitives(masked, mask_, column_dot, mask_and_dot, dropped, take_columns, spread_columns_)
masked_lora_linear_forward = partial(aten.masked_lora_linear_forward, primitives=_PRIMITIVES)
masked_lora_linear_backward = partial(aten.masked_lora_linear_backward, primitives=_PRIMITIVES)
kept_lora_linear_forward = partial(kept.kept_lora_linear_forward, primitives=_PRIMITIVES)
kept_lora_linear_backward = partial(kept.kept_lora_linear_backward, primitives=_PRIMITIVES)
