"""What a user calls: checks, automatic casting and the choice between eager and compiled execution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels import ops
from atp_kernels.call import select
from atp_kernels.checks import check_dropout, check_linear

_NARROWED = (torch.float32, torch.bfloat16)  # the dtypes from which and to which a weight is cast and merged at once


def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    mask_lora: bool = False,
    bias: Tensor | None = None,
    lora_input: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = m_out * ((m_in * x) W^T + bias) + scaling * (lora_input A^T) B^T, with all its gradients.

    With `mask_lora` the output mask covers the sum and the adapter reads the in-masked input too.

    x [..., in]; weight [out, in]; lora_a [r, in]; lora_b [out, r]; out_mask [out]; in_mask [in]; bias [out];
    lora_input like x (default x). Returns [..., out] in the dtype of x. Masks are bool (hard, constant) or floating
    (soft, differentiable, used in float32 whatever x is). x and weight share a dtype; the factors, bias and lora_input
    are cast to it. Under autocast all but the masks are cast to the autocast dtype; there a constant adapter may be
    added to a float32 weight before the cast, which rounds once where two paths round twice.
    `dropout` p in [0, 1) makes lora_input = keep * x / (1 - p), in place of a given one, and gradients flow to x
    through the same keep. Seeing x as a matrix, element (m, k) is kept where word k % 4 of Philox-4x32-7 with counter
    (m, k // 4, 0, 0) and key `seed` is at least floor(p * 2^32), so that backward draws it again and nothing of it is
    stored. `seed`: an int64 as an int, or as a 0-d CPU tensor, for which torch.compile compiles once; a seed drops the
    same elements each time, so give each call of a step one of its own, and leave a tensor as it is until backward.
    Differentiable once in every floating input that requires it. Raises ValueError for wrong shapes, dtypes, devices or
    dropout and RuntimeError for a named backend that cannot take the call.
    Source: arXiv 2412.14426, section 3; Philox: Salmon et al. 2011.
    """
    if dropout != 0:
        check_dropout(dropout, seed, lora_input)
    operands = (x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    if dropout == 0 and (mask_lora or (out_mask is None and in_mask is None)):
        tensors = prepare_linear(*operands, merge=float(scaling), backend=backend)
    else:
        tensors = prepare_linear(*operands)
    return ops.linear(tensors, float(scaling), mask_lora, False, float(dropout), seed, backend)


def masked_lora_linear_with_norms(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    mask_lora: bool = False,
    bias: Tensor | None = None,
    lora_input: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`masked_lora_linear`, and the squared norms of B's rows and A's columns from the same pass.

    Returns (y [..., out], b_row_sq [out], a_col_sq [in]); the norms are float32 (float64 in float64), of the factors
    as the pass reads them (after any cast), and differentiable in A and B. Errors as in `masked_lora_linear`.
    """
    if dropout != 0:
        check_dropout(dropout, seed, lora_input)
    tensors = prepare_linear(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    return ops.linear(tensors, float(scaling), mask_lora, True, float(dropout), seed, backend)


def lora_dropout(x: Tensor, p: float, seed: int | Tensor, *, backend: str = "auto") -> Tensor:
    """keep * x / (1 - p): what `masked_lora_linear` with this dropout and seed hands to its adapter, on its own.

    x [..., K], floating; p in [0, 1); `keep` and `seed` as in `masked_lora_linear`. Returns a tensor like x.
    Differentiable: the gradient is the same dropout of the gradient, drawn again, and nothing of x or keep is stored.
    Raises ValueError for a wrong dtype, p or seed and RuntimeError for a named backend that cannot take the call.
    Source: Srivastava et al. 2014; Philox: Salmon et al. 2011.
    """
    check_dropout(p, seed, None)
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}: give a floating tensor [..., K].")
    return ops.dropped(x, float(p), seed, backend) if p else x


def prepare_linear(
    x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask, *, merge: float | None = None, backend: str = "auto"
) -> tuple[Tensor | None, ...]:
    """Check the operands of a linear and cast them as autocast and the dtype rules ask.

    `merge` is the scaling of an adapter that reads and feeds what the base does, None of another. Where autocast casts
    such a linear anyway and the adapter is constant, it becomes part of the weight on the way, if `backend` has a
    kernel for that, and factors of rank 0 stand for it.
    """
    lora_input = None if lora_input is x else lora_input
    ready = _are_ready(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    if not ready:
        check_linear(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        mergeable = merge is not None and lora_input is None
        merged = _merged(weight, lora_a, lora_b, merge, dtype, backend) if mergeable else None
        weight, lora_a, lora_b = merged or (weight.to(dtype), lora_a, lora_b)
    elif ready:
        return x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask
    elif weight.dtype != dtype:
        raise ValueError(f"weight is {weight.dtype} and x is {dtype}: cast one of them, or run under torch.autocast.")
    lora_a, lora_b, bias = _cast(lora_a, dtype), _cast(lora_b, dtype), _cast(bias, dtype)
    lora_input = _cast(lora_input, dtype)
    return x, weight, lora_a, lora_b, bias, lora_input, _as_mask(out_mask, dtype), _as_mask(in_mask, dtype)


def _merged(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(weight + scaling * lora_b lora_a in `dtype`, factors of rank 0) of a constant adapter, None of another.

    None too where no kernel makes it at the cost of the cast, and for a compiler, which fuses casts by itself.
    """
    if torch.compiler.is_compiling() or weight.device.type != "cpu" or (weight.dtype, dtype) != _NARROWED:
        return None
    if torch.is_grad_enabled() and (weight.requires_grad or lora_a.requires_grad or lora_b.requires_grad):
        return None
    module = select("masked_lora_linear", weight.device, dtype, backend)[0]
    if not hasattr(module, "merged_weight"):
        return None
    return module.merged_weight(weight, lora_a, lora_b, scaling), lora_a[:0], lora_b[:, :0]


def _are_ready(x, weight, lora_a, lora_b, bias, lora_input, out_mask, in_mask) -> bool:
    """Whether the operands need neither a cast nor a word from `check_linear`, in as few comparisons as that takes.

    Eager code makes hundreds of calls a step, and nearly all of them pass here.
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


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # Asked first, because a `to` that does nothing is a call into ATen all the same.
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _as_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Hard masks stay bool; soft ones are used in float32 (float64 beside float64)."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.to(torch.float64 if dtype == torch.float64 else torch.float32)
