"""RMSNorm in plain PyTorch, alone and with the residual connection: the definition every backend is held to."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """weight * x / sqrt(mean of x squared over the last dimension + eps) (Zhang, Sennrich 2019), rounded to `dtype`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (weight * normed).to(x.dtype if dtype is None else dtype)


def add_rms_norm(
    x: Tensor, output: Tensor, weight: Tensor, eps: float, multiplier: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(x + multiplier * output, its `rms_norm`)."""
    stream = added(x, output, multiplier)
    return stream, rms_norm(stream, weight, eps, dtype)


def added(x: Tensor, output: Tensor, multiplier: float) -> Tensor:
    """x + multiplier * output, in the dtype to which torch promotes theirs."""
    return x + (output if multiplier == 1 else output * multiplier)
