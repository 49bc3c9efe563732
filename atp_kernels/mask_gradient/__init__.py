"""The gradient of a mask that would cover a matrix, as a by-product of its backward pass."""

import torch
from torch import Tensor

from atp_kernels.kinds import typed
from atp_kernels.mask_gradient import op


@typed
def mask_gradient(y: Tensor, sums: Tensor, *, backend: str = "auto") -> Tensor:
    """y as it is; its backward pass adds to `sums` what a mask of ones on y would have for a gradient in each sample.

    y [samples, ..., features], floating: the values of each sample lie together. sums: float32 or wider, [samples,
    features], without gradient, on the device of y. Where the gradient of y is G, the row of a sample grows by the sums
    of G * y over all of its values, and G passes unchanged. Differentiable once. Raises ValueError for wrong shapes,
    dtypes or devices, RuntimeError for a named backend that cannot take the call. Source: arXiv 2412.14426, section 3.

    >>> y, sums = torch.ones(2, 3, 4, requires_grad=True), torch.zeros(2, 4)
    >>> mask_gradient(y, sums).sum().backward()
    >>> sums
    tensor([[3., 3., 3., 3.],
            [3., 3., 3., 3.]])
    """
    if y.ndim < 2:
        raise ValueError(f"y has shape {list(y.shape)}: give [samples, ..., features].")
    if sums.shape != (y.shape[0], y.shape[-1]):
        raise ValueError(
            f"sums has shape {list(sums.shape)}, but y {list(y.shape)} needs [samples, features] of y [samples, ..., "
            "features]."
        )
    check_sums(sums, y)
    return op.mask_gradient(y, sums, backend)


def check_sums(sums: Tensor, like: Tensor, name: str = "sums") -> None:
    """Raise ValueError for sums that no backward pass can add to."""
    if sums.dtype not in (torch.float32, torch.float64) or sums.requires_grad:
        raise ValueError(f"{name} is {sums.dtype}: give float32 or float64 without gradient.")
    if sums.device != like.device:
        raise ValueError(f"{name} is on {sums.device} and the values on {like.device}: move them to one device.")
