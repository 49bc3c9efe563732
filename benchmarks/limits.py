"""What a device can do at most, and how near a measured time comes to it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.case import Work
from benchmarks.measure import clock

_REPEATS = 7
_GEMM = {"cpu": 1536, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True)
class Limits:
    """FLOP/s of a large matrix product and bytes/s of a large copy, counting bytes read and written.

    What stays in a cache between rounds can be faster than the copy: shares above 1 mean that.
    """

    flops: float
    bandwidth: float

    def milliseconds(self, work: Work) -> float:
        """The least time for this work: the longer of computing and moving."""
        return 1e3 * max(work.flops / self.flops, work.bytes / self.bandwidth)

    @classmethod
    def measured(cls, device: str, dtype: torch.dtype, *, gemm: int = 0, copy_bytes: int = 0) -> "Limits":
        """The best of some products and copies on random data, here and now."""
        size, count = gemm or _GEMM[device], (copy_bytes or _COPY_BYTES[device]) // dtype.itemsize
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(left)
        flops = 2 * size**3 / _best(lambda: torch.mm(left, right, out=product), device)
        source = torch.randn(count, device=device, dtype=dtype)
        target = torch.empty_like(source)
        return cls(flops, 2 * count * dtype.itemsize / _best(lambda: target.copy_(source), device))


def _best(call: Callable[[], object], device: str) -> float:
    """Seconds of the quickest of a few calls, the first left out."""
    timed = clock(device)
    return min([timed(call) for _ in range(_REPEATS + 1)][1:]) / 1e3
