"""Which backends take a call on a CPU here."""

import torch

from atp_kernels.call import select


def takes(op: str, dtype: torch.dtype, backend: str) -> bool:
    """Whether this backend does."""
    try:
        select(op, torch.device("cpu"), dtype, backend)
    except RuntimeError:
        return False
    return True


def backends(op: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The names of those that do."""
    return [name for name in ("reference", "native", "triton") if takes(op, dtype, name)]
