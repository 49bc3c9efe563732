"""What a device can do at most, for estimates: published peaks of GPUs, and this CPU's rates measured on the spot."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.limits import Limits

_LAUNCH = 5e-6  # an assumption for eager PyTorch on a GPU, and no measurement


@dataclass(frozen=True)
class Rates:
    """Operations per second of matrix products, bytes per second of memory, seconds that starting a kernel takes."""

    name: str
    flops: float
    bandwidth: float
    launch: float
    source: str


GPUS = {
    "a100": Rates("A100 SXM 80 GB", 312e12, 2.039e12, _LAUNCH, "NVIDIA A100 datasheet, dense bf16"),
    "h100": Rates("H100 SXM", 989e12, 3.35e12, _LAUNCH, "NVIDIA H100 datasheet, bf16 without sparsity"),
    "h200": Rates("H200 SXM", 989e12, 4.8e12, _LAUNCH, "NVIDIA H200 datasheet, bf16 without sparsity"),
}


def find_rates(name: str, dtype: torch.dtype) -> Rates:
    """The rates of a GPU in `GPUS`, or with `cpu` those that a product, a copy and a tiny addition show here and now.

    Raises ValueError for an unknown name.
    """
    if name in GPUS:
        return GPUS[name]
    if name != "cpu":
        raise ValueError(f"unknown GPU {name!r}: use one of {', '.join([*GPUS, 'cpu'])}.")
    limits = Limits.measured("cpu", dtype, gemm=1024, copy_bytes=2**26)
    return Rates("this CPU", limits.flops, limits.bandwidth, _seconds_of_a_call(), "measured on the spot")


def _seconds_of_a_call(calls: int = 2000) -> float:
    x = torch.zeros(8)
    start = time.perf_counter()
    for _ in range(calls):
        x.add_(1.0)
    return (time.perf_counter() - start) / calls
