"""What a device can do at most, for estimates: published peaks of GPUs, and this CPU's rates measured on the spot."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from atp.plan.cost import ATTENTION_BACKWARD
from benchmarks.layer_model import CAUSAL
from benchmarks.limits import Limits

_LAUNCH = 5e-6  # an assumption for eager PyTorch on a GPU, and no measurement


@dataclass(frozen=True)
class Rates:
    """Operations per second of products and of attention, bytes per second of memory, seconds that a launch takes.

    Of a GPU one peak serves both. A CPU's attention, on small tiles and with exponentials, is far below its products.
    """

    name: str
    flops: float
    attention: float
    bandwidth: float
    launch: float
    source: str


GPUS = {
    "a100": Rates("A100 SXM 80 GB", 312e12, 312e12, 2.039e12, _LAUNCH, "NVIDIA A100 datasheet, dense bf16"),
    "h100": Rates("H100 SXM", 989e12, 989e12, 3.35e12, _LAUNCH, "NVIDIA H100 datasheet, bf16 without sparsity"),
    "h200": Rates("H200 SXM", 989e12, 989e12, 4.8e12, _LAUNCH, "NVIDIA H200 datasheet, bf16 without sparsity"),
}


def find_rates(name: str, dtype: torch.dtype) -> Rates:
    """The rates of a GPU in `GPUS`, or with `cpu` those that this CPU shows here and now.

    Raises ValueError for an unknown name.
    """
    if name in GPUS:
        return GPUS[name]
    if name != "cpu":
        raise ValueError(f"unknown GPU {name!r}: use one of {', '.join([*GPUS, 'cpu'])}.")
    limits = Limits.measured("cpu", dtype, gemm=1024, copy_bytes=2**26)
    attention = _attention_flops(dtype)
    return Rates("this CPU", limits.flops, attention, limits.bandwidth, _seconds_of_a_call(), "measured on the spot")


def _attention_flops(dtype: torch.dtype) -> float:
    """Of the quickest of eight causal calls with their backward pass, operations counted as the model counts them."""
    heads, length, width = 8, 512, 64
    q, k, v = (torch.randn(1, heads, length, width, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(1, heads, length, width, dtype=dtype)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        scaled_dot_product_attention(q, k, v, is_causal=True).backward(gradient)
        best = min(best, time.perf_counter() - start)
    squares = CAUSAL * 2 * 2.0 * heads * length**2 * width  # q k^T and p v
    return (1 + ATTENTION_BACKWARD) * squares / best


def _seconds_of_a_call(calls: int = 2000) -> float:
    x = torch.zeros(8)
    start = time.perf_counter()
    for _ in range(calls):
        x.add_(1.0)
    return (time.perf_counter() - start) / calls
