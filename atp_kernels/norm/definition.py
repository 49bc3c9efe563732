"""RMSNorm in plain PyTorch: the definition every backend is held to."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """weight * x / sqrt(mean of x squared over the last dimension + eps) (Zhang, Sennrich 2019), rounded to `dtype`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (weight * normed).to(x.dtype if dtype is None else dtype)
