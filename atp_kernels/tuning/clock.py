"""The time of one call, on a CPU or a GPU."""

import time
from collections.abc import Callable

import torch

Call = Callable[[], object]


def clock(device: str) -> Callable[[Call], float]:
    """A function that runs a call and returns its milliseconds.

    On a GPU between two events on the stream, with the L2 cache flushed before; on a CPU by the wall clock, where
    caches are as the variant before left them.
    """
    if device == "cpu":
        return _on_cpu
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(size, dtype=torch.int8, device=device)

    def on_gpu(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        scratch.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return on_gpu


def _on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
