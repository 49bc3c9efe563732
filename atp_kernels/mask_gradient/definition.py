"""The gradient of a mask of each sample in plain PyTorch: the definition every backend is held to."""

from torch import Tensor


def masked(y: Tensor, mask: Tensor) -> Tensor:
    """y [samples, ..., features] under a mask [samples, features], which `mask_gradient` differentiates at ones.

    Source: arXiv 2412.14426, section 3.
    """
    return y * mask.view(len(y), *[1] * (y.ndim - 2), y.shape[-1])
