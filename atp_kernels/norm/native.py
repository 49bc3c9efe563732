"""RMSNorm in C++ on a CPU (csrc/cpu/norm.cpp)."""

from functools import partial

import torch
from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call, shown
from atp_kernels.norm import aten


def supports(call: Call) -> str | None:
    """float32 and bfloat16 on a CPU, rounded to either."""
    if call.result is not None and call.result not in extension.DTYPES:
        return f"the native backend rounds to float32 or bfloat16, not to {shown(call.result)}"
    return extension.refuses(call)


def forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `aten.forward`."""
    weight = weight.detach().float().contiguous()
    x = x if dtype == torch.bfloat16 else x.to(dtype)
    return extension.ops.rms_norm_forward(x.contiguous(), weight, eps, dtype == torch.bfloat16)


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, scales: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """As `aten.backward`, which takes the gradient of the weight."""
    d_weight = aten.weight_grad(d_y, x, weight, scales) if need_weight else None
    return input_grad(d_y, x, weight, scales) if need_x else None, d_weight


def input_grad(d_y: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """As `aten.input_grad`."""
    weight = weight.detach().float().contiguous()
    return extension.ops.rms_norm_backward(d_y.contiguous(), x.contiguous(), weight, scales)


add_forward = partial(aten.add_forward, alone=forward)
add_backward = partial(aten.add_backward, alone=backward)
