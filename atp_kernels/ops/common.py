"""What every operation shares."""

from collections.abc import Collection, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from atp_kernels.reference import Dropout


def refuse_twice(ctx, *grads):
    """The backward of every backward."""
    raise RuntimeError("atp_kernels operations can be differentiated once: drop create_graph=True for them.")


def common_dtype(factors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that decides the backend: the one among the factors' that the fewest backends take."""
    return rarest_dtype(set(map(attrgetter("dtype"), factors)))


def rarest_dtype(present: Collection[torch.dtype]) -> torch.dtype:
    """`common_dtype` of factors that have these dtypes."""
    rare_first = (torch.float64, torch.float16, torch.float32, torch.bfloat16)
    return next((dtype for dtype in rare_first if dtype in present), next(iter(present)))


def matrix(tensor: Tensor) -> Tensor:
    """The tensor as rows of its last dimension."""
    # Not even a view where nothing changes: eager code makes hundreds of calls a step.
    if tensor.ndim == 2:
        return tensor
    return tensor.flatten(0, -2) if tensor.ndim > 2 else tensor.unsqueeze(0)  # unlike a -1, fit for a width of zero


def dropout_of(p: float, seed: int | Tensor | None) -> Dropout | None:
    """Probability and seed as backends take them, None where nothing is dropped."""
    return Dropout(p, int(seed)) if p else None
