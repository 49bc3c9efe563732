"""Which precision is faster on this machine, measured by a probe."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]

_SHAPE = (1024, 576, 1536)  # rows, in, out: a small model's linear


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The dtype for torch.autocast, None for plain float32; `auto` takes bfloat16 where a probe finds it faster."""
    if precision == "auto":
        precision = "bfloat16" if bfloat16_is_quicker() else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


@cache
def bfloat16_is_quicker() -> bool:
    """True on a CUDA device with bfloat16; on a CPU, whether a bfloat16 matmul beats the float32 one by a fifth.

    Asked once a process, so that all parts of a run agree.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return _matmul_seconds(torch.bfloat16) < 0.8 * _matmul_seconds(torch.float32)


def _matmul_seconds(dtype: torch.dtype, repeats: int = 7) -> float:
    rows, inner, out = _SHAPE
    x, w = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, out, dtype=dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        x @ w
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]
