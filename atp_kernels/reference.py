"""The mathematics in unfused PyTorch: the definition every backend is held to.

Nothing here is tuned. Each function is the formula, differentiable by autograd, in whatever dtype it is given;
tests run it in float64 and compare the backends with it.
"""

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
    """Sum over removed, non-empty groups of sqrt(sum of squares + eps) (arXiv 2412.14426, section 3)."""
    squares = group_squares(factors, groups, removed.numel())
    counted = removed & owned_groups(groups, removed)
    return torch.where(counted, (squares + eps).sqrt(), 0).sum()


def group_prox_(factors: Sequence[Tensor], groups: Groups, removed: Tensor, threshold: float | Tensor) -> None:
    """group <- group * max(0, 1 - threshold / ||group||) in place, for removed groups; exact zeros at the bottom."""
    with torch.no_grad():
        norms = group_squares(factors, groups, removed.numel()).sqrt()
        # Asked this way round a NaN norm stays visible as NaN instead of becoming a clean zero.
        shrunk = torch.where(norms <= threshold, 0, 1 - threshold / norms)
        scale = torch.where(removed, shrunk, 1)
        for factor, (axis, index) in zip(factors, groups, strict=True):
            by_group = scale[index].unsqueeze(1 - axis)
            factor.copy_(torch.where(by_group == 0, 0, factor * by_group))


def compact(weight: Tensor, rows: Tensor | None = None, cols: Tensor | None = None, pad_to: int = 1) -> Tensor:
    """The kept rows and columns of `weight`, each gathered side zero-padded to a multiple of `pad_to`."""
    kept = weight if rows is None else weight[rows]
    kept = kept if cols is None else kept[:, cols]
    n_rows = kept.shape[0] if rows is None else round_up(kept.shape[0], pad_to)
    n_cols = kept.shape[1] if cols is None else round_up(kept.shape[1], pad_to)
    padded = weight.new_zeros(n_rows, n_cols)
    padded[: kept.shape[0], : kept.shape[1]] = kept
    return padded


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row, whose gradient softmax(logits) - onehot(target) replaces the logits."""
    index = targets.unsqueeze(1)
    log_p = torch.log_softmax(_wide(logits), dim=1)
    losses = -log_p.gather(1, index).squeeze(1)
    logits.copy_(log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0)))
    return losses


def owned_groups(groups: Groups, removed: Tensor) -> Tensor:
    """bool [n_groups]: which groups own at least one row or column of a factor."""
    return torch.zeros_like(removed).index_fill_(0, torch.cat([index for _, index in groups]).long(), True)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
