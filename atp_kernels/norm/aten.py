"""RMSNorm of matrices in ATen calls, with its gradient derived by hand, alone and after an addition."""

from collections.abc import Callable

import torch
from torch import Tensor

from atp_kernels.call import Call
from atp_kernels.norm.definition import added


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


def add_forward(
    x: Tensor,
    output: Tensor,
    weight: Tensor,
    eps: float,
    multiplier: float,
    dtype: torch.dtype,
    *,
    alone: Callable[..., tuple[Tensor, Tensor]] = forward,
) -> tuple[Tensor, Tensor, Tensor]:
    """(stream [M, K], y [M, K] in `dtype`, scales [M]): stream = x + multiplier * output, and `forward` of it."""
    stream = added(x, output, multiplier)
    return stream, *alone(stream, weight, eps, dtype)


def add_backward(
    d_stream: Tensor | None,
    d_y: Tensor,
    stream: Tensor,
    weight: Tensor,
    scales: Tensor,
    need_sum: bool,
    output: torch.dtype | None,
    multiplier: float,
    need_weight: bool,
    *,
    alone: Callable[..., tuple[Tensor | None, Tensor | None]] = backward,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_sum, d_output, d_weight), None where not needed: d_sum = d_stream + d_x of `backward`, for which x is stream.

    d_output = multiplier * d_sum, in the dtype `output`; None where that is d_sum itself or nobody needs it.
    """
    d_sum, d_weight = alone(d_y, stream, weight, scales, need_sum, need_weight)
    if d_sum is not None and d_stream is not None:
        d_sum += d_stream
    return d_sum, None if d_sum is None or output is None else output_grad(d_sum, output, multiplier), d_weight


def output_grad(d_sum: Tensor, output: torch.dtype, multiplier: float) -> Tensor:
    """d_output of `add_backward`, of a d_sum of any shape."""
    narrow = d_sum.to(output)
    return narrow if multiplier == 1 else narrow * multiplier
