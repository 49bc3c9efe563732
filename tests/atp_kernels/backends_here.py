"""Where tests compute, and which backends take a call there.

DEVICE is a GPU where there is one and Triton compiles for it. Else it is the CPU, where Triton runs in its interpreter.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from atp_kernels import triton_runtime
from atp_kernels.call import select

ON_GPU = torch.cuda.is_available() and not triton_runtime.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"


def takes(op: str, dtype: torch.dtype, backend: str, device: str = DEVICE) -> bool:
    """Whether this backend does."""
    try:
        select(op, torch.device(device), dtype, backend)
    except RuntimeError:
        return False
    return True


def backends(op: str, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> list[str]:
    """The names of those that do."""
    return [name for name in ("reference", "native", "triton") if takes(op, dtype, name, device)]


def on_device(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same leaves on DEVICE."""
    return {name: t.detach().to(DEVICE).requires_grad_(t.requires_grad) for name, t in tensors.items()}


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """What is read before it is written shows in a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills every torch.empty
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
