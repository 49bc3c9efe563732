"""Copies from the host that nobody waits for."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype and device, each 1-D, on a device: themselves where they lie there, else after one copy.

    A plain copy to a GPU starts when all work before it is done and halts the host until then. From pinned memory the
    copy queues up behind that work, and the host goes on.
    """
    if tensors[0].device == device:
        return list(tensors)
    joined = torch.cat(list(tensors))
    if device.type == "cuda" and joined.device.type == "cpu":
        joined = joined.pin_memory()
    return list(joined.to(device, non_blocking=True).split([len(tensor) for tensor in tensors]))
