"""RMSNorm, alone and with the residual connection before it."""

import math

import torch
from torch import Tensor

from atp_kernels.checks import check_eps
from atp_kernels.kinds import typed
from atp_kernels.norm import op


@typed
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """weight * x / sqrt(mean of x squared + eps) over the last dimension, in float32 or better, rounded once.

    x [..., K], weight [K], floating; dtype of the result: that of x by default, another where the reader would cast.
    Saves x and one number per row. Differentiable once in x and weight. Raises ValueError for wrong shapes, dtypes,
    devices or eps, RuntimeError for a named backend that cannot take the call. Source: Zhang, Sennrich 2019.

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.0).square().sum()
    tensor(2.)
    """
    _check(x, weight, eps, dtype)
    return op.rms_norm(x, weight, float(eps), dtype or x.dtype, backend)


@typed
def add_rms_norm(
    x: Tensor,
    output: Tensor,
    weight: Tensor,
    *,
    eps: float,
    multiplier: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(x + multiplier * output, its `rms_norm`): a residual connection and the norm before the next block, in one pass.

    x [..., K]: the residual stream; output, like x: what a block gives; weight [K], floating. The sum has the dtype to
    which torch promotes those of x and output; dtype of its norm: the same by default, another where the reader would
    cast. Saves the sum, which must not be changed in place before backward, and one number per row. Differentiable once
    in x, output and weight. Raises as `rms_norm`, ValueError too for an output that does not fit x.

    >>> stream, normed = add_rms_norm(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.0]), torch.ones(2), eps=0.0)
    >>> stream, normed.square().sum()
    (tensor([3., 4.]), tensor(2.))
    """
    _check(x, weight, eps, dtype)
    if output.shape != x.shape or not output.is_floating_point() or output.device != x.device:
        given = f"{output.dtype} of shape {list(output.shape)} on {output.device}"
        raise ValueError(f"output is {given}, but x needs a floating {list(x.shape)} on {x.device}.")
    if not math.isfinite(multiplier):
        raise ValueError(f"multiplier is {multiplier}: give a finite number.")
    return op.add_rms_norm(x, output, weight, float(eps), float(multiplier), dtype, backend)


def _check(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None) -> None:
    """Raise ValueError for what RMSNorm does not take."""
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}: give a floating tensor [..., K].")
    if weight.shape != x.shape[-1:] or not weight.is_floating_point() or weight.device != x.device:
        given = f"{weight.dtype} of shape {list(weight.shape)} on {weight.device}"
        raise ValueError(f"weight is {given}, but x needs a floating [{x.shape[-1]}] on {x.device}.")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: give a floating one.")
    check_eps(eps)
