"""What differs between devices: copies from the host that nobody waits for, and who can compute in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the tensor itself where it lies there already.

    A plain copy to a GPU starts when all work before it is done and halts the host until then. From pinned memory the
    copy queues up behind that work, and the host goes on.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def for_float64(device: torch.device) -> torch.device:
    """The device itself where it computes in float64, else the host: Apple's MPS does not."""
    return torch.device("cpu") if device.type == "mps" else device
