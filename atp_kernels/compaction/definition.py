"""Compaction in plain PyTorch: the definition every backend is held to."""

from torch import Tensor


def compact(weight: Tensor, rows: Tensor | None = None, cols: Tensor | None = None, pad_to: int = 1) -> Tensor:
    """The kept rows and columns of `weight`, each gathered side zero-padded to a multiple of `pad_to`."""
    kept = weight if rows is None else weight[rows]
    kept = kept if cols is None else kept[:, cols]
    n_rows = kept.shape[0] if rows is None else round_up(kept.shape[0], pad_to)
    n_cols = kept.shape[1] if cols is None else round_up(kept.shape[1], pad_to)
    padded = weight.new_zeros(n_rows, n_cols)
    padded[: kept.shape[0], : kept.shape[1]] = kept
    return padded


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple
