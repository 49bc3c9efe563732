"""RMSNorm."""

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
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}: give a floating tensor [..., K].")
    if weight.shape != x.shape[-1:] or not weight.is_floating_point() or weight.device != x.device:
        given = f"{weight.dtype} of shape {list(weight.shape)} on {weight.device}"
        raise ValueError(f"weight is {given}, but x needs a floating [{x.shape[-1]}] on {x.device}.")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: give a floating one.")
    check_eps(eps)
    return op.rms_norm(x, weight, float(eps), dtype or x.dtype, backend)
