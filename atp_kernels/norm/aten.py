"""RMSNorm of matrices in ATen calls, with its gradient derived by hand."""

import torch
from torch import Tensor

from atp_kernels.call import Call


def supports(call: Call) -> str | None:
    """Every call."""
    return None


def forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y [M, K] in `dtype`, scales [M]): scales = 1 / sqrt(mean of x squared + eps), in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = (wide.square().mean(1) + eps).rsqrt()
    return (weight * (wide * scales.unsqueeze(1))).to(dtype), scales


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, scales: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(d_x, d_weight), None where not needed.

    d_x = scale * (g - x * scale^2 * mean of g * x) with g = weight * d_y; d_weight = column sums of d_y * x * scale.
    """
    d_x = input_grad(d_y, x, weight, scales) if need_x else None
    return d_x, weight_grad(d_y, x, weight, scales) if need_weight else None


def input_grad(d_y: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """d_x of `backward`."""
    wide, scale = x.to(scales.dtype), scales.unsqueeze(1)
    direct = d_y.to(scales.dtype) * weight
    pull = (direct * wide).mean(1, keepdim=True) * scale.square()
    return ((direct - wide * pull) * scale).to(x.dtype)


def weight_grad(d_y: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """d_weight of `backward`."""
    return (d_y.to(scales.dtype) * x * scales.unsqueeze(1)).sum(0).to(weight.dtype)
