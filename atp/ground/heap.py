"""Memory of freed tensors, given back to the system between the parts of a run.

glibc keeps what tensors below its mmap threshold (up to 32 MB) leave behind, several hundred megabytes after the open
phase of SmolLM2-135M, and the next part of a run finds little use for these pieces (docs/plan.md).
"""

import ctypes
import gc
from collections.abc import Callable
from functools import cache

from torch import Tensor, nn


def give_back() -> None:
    """Frees what only cycles of objects hold, as hooks do of a sharded model, and returns free memory to the system.

    The latter where the C library has `malloc_trim`.
    """
    gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


def address(tensor: Tensor) -> int:
    """Where a tensor's memory starts; 0 for one without memory of its own, as shards and quantized weights are."""
    return tensor.untyped_storage().data_ptr() if type(tensor.data) is Tensor else 0


def addresses(model: nn.Module | None) -> set[int]:
    """Where the weights of a model lie."""
    return {address(weight) for weight in model.parameters()} - {0} if model is not None else set()


def move_from(model: nn.Module, old: set[int]) -> None:
    """Copies the weights of a model that lie at old addresses, those of a larger model that has just been let go of.

    Weights can lie in the memory of their file, all of which counts as used as long as one of them does.
    """
    for weight in model.parameters():
        if address(weight) in old and weight.device.type == "cpu":
            weight.data = weight.data.clone()


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another libc than glibc; a system without a shared one
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
