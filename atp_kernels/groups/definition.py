"""Group lasso and its proximal step in plain PyTorch: the definition every backend is held to."""

from collections.abc import Sequence

import torch
from torch import Tensor

Groups = Sequence[tuple[int, Tensor]]
"""For each factor, the axis that is grouped (0 rows, 1 columns) and the group id of every row or column."""


def group_squares(factors: Sequence[Tensor], groups: Groups, n_groups: int) -> Tensor:
    """Sum of squares [n_groups] of each joint group over all factors that own a part of it."""
    dtype = torch.float64 if any(factor.dtype == torch.float64 for factor in factors) else torch.float32
    parts = [factor.to(dtype).square().sum(1 - axis) for factor, (axis, _) in zip(factors, groups, strict=True)]
    squares = torch.zeros(n_groups, dtype=dtype, device=factors[0].device)
    index = torch.cat([index for _, index in groups])
    if squares.is_cuda:
        # index_add_ is atomic on CUDA; index_put_ sorts first, so that the sum is the same every time.
        return squares.index_put_((index,), torch.cat(parts), accumulate=True)
    return squares.index_add_(0, index, torch.cat(parts))


def group_lasso(factors: Sequence[Tensor], groups: Groups, removed: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Sum over removed, non-empty groups of sqrt(sum of squares + eps) (docs/method.md section 4)."""
    squares = group_squares(factors, groups, removed.numel())
    counted = removed & owned_groups(groups, removed)
    return torch.where(counted, (squares + eps).sqrt(), 0).sum()


def group_prox_(factors: Sequence[Tensor], groups: Groups, removed: Tensor, threshold: float | Tensor) -> None:
    """group <- group * max(0, 1 - threshold / ||group||) in place, for removed groups; exact zeros at the bottom."""
    with torch.no_grad():
        norms = group_squares(factors, groups, removed.numel()).sqrt()
        # Written this way, a NaN norm stays visible as NaN instead of becoming a clean zero.
        shrunk = torch.where(norms <= threshold, 0, 1 - threshold / norms)
        scale = torch.where(removed, shrunk, 1)
        for factor, (axis, index) in zip(factors, groups, strict=True):
            by_group = scale[index].unsqueeze(1 - axis)
            factor.copy_(torch.where(by_group == 0, 0, factor * by_group))


def owned_groups(groups: Groups, removed: Tensor) -> Tensor:
    """bool [n_groups]: which groups own at least one row or column of a factor."""
    return torch.zeros_like(removed).index_fill_(0, torch.cat([index for _, index in groups]).long(), True)
