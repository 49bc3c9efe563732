"""Memory of freed tensors, given back to the system between the parts of a run.

glibc keeps what tensors below its mmap threshold (up to 32 MB) leave behind, several hundred megabytes after the open
phase of SmolLM2-135M, and the next part of a run finds little use for these pieces (docs/plan.md).
"""

import ctypes
import gc
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Frees what only cycles of objects hold, as hooks do of a sharded model, and returns free memory to the system.

    The latter where the C library has `malloc_trim`.
    """
    gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another libc than glibc; a system without a shared one
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
