"""The time of one call, on a CPU or a GPU."""

import math
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]

HEAD_START = 1.5
"""How long a GPU is kept busy before a call, in times of what the host needed to launch the slowest one so far."""
FIRST_START_MS = 3.0
"""Of the calls before it is known: launching a linear forward and backward takes a third of it."""
MOST_FILLS = 300
"""Launches that wait for a GPU at a time, some 10 ms of work: beyond about a thousand the host has to wait itself."""


def clock(device: str) -> Callable[[Call], float]:
    """A function that runs a call and returns its milliseconds.

    On a GPU they are those of its kernels: see `GpuClock`. On a CPU by the wall clock, where caches are as the variant
    before left them.
    """
    return _on_cpu if device == "cpu" else GpuClock(device)


class GpuClock:
    """Times a call between two events on the stream, with the L2 cache flushed before.

    Flushing also gives the host a head start: until the GPU has filled the scratch memory so many times, the host has
    launched the whole call, and its kernels follow each other without a gap. Without it a call of few rows would be as
    slow as Python. A call that waits for the GPU on its way, or that the host takes longer to launch than the longest
    start, is timed with its gaps. None is run twice: a backward pass frees what it reads.
    """

    def __init__(self, device: str) -> None:
        self._scratch = torch.empty(
            2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device
        )
        self._device, self._fills = device, 1
        self._timed(self._fill)  # the first launch loads the kernel
        self._fill_ms = self._timed(lambda: self._fill(20))[0] / 20
        self._start_for(FIRST_START_MS)

    def __call__(self, call: Call) -> float:
        """Milliseconds of the call's kernels."""
        on_gpu, on_host = self._timed(call)
        self._start_for(HEAD_START * on_host)
        return on_gpu

    def _start_for(self, milliseconds: float) -> None:
        self._fills = max(self._fills, min(math.ceil(milliseconds / self._fill_ms), MOST_FILLS))

    def _fill(self, times: int = 1) -> None:
        for _ in range(times):
            self._scratch.zero_()

    def _timed(self, call: Call) -> tuple[float, float]:
        """Milliseconds between the events around a call, and of the host that launched it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        self._fill(self._fills)
        start.record()
        host_start = time.perf_counter()
        call()
        on_host = 1e3 * (time.perf_counter() - host_start)
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end), on_host


def _on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
