"""Checks of operands that rooms share: each raises ValueError with one sentence that names the remedy."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_eps(eps: float) -> None:
    """Refuse an eps that is negative, infinite or NaN."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}: give a finite number of at least 0.")


def check_range(holder: str, index: Tensor, size: int, kind: str) -> None:
    """Refuse an index outside [0, size); under a compiler and for meta tensors, which hold no values, check nothing."""
    if torch.compiler.is_compiling() or index.is_meta or index.numel() == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{holder} {low} to {high}: every {kind} must lie in [0, {size}).")


def check_dropout(x: Tensor, dropout: float, seed: int | Tensor | None, lora_input: Tensor | None) -> None:
    """Refuse a probability outside [0, 1) and, above 0, a missing or unfit seed and a separate input of the adapter.

    A seed on the host is refused while a CUDA graph is captured: every replay would drop what the first one does.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: give a probability of at least 0 and below 1.")
    if dropout == 0:
        return
    if lora_input is not None:
        raise ValueError("dropout makes the adapter's input from x: leave lora_input out, or dropout at 0.")
    if seed is None:
        raise ValueError("dropout needs a seed: give an int or a 0-d int64 tensor, a new one for each call.")
    if isinstance(seed, Tensor):
        if seed.ndim != 0 or seed.dtype != torch.int64 or seed.device not in (torch.device("cpu"), x.device):
            given = f"{seed.dtype} tensor of shape {list(seed.shape)} on {seed.device}"
            beside = "" if x.device.type == "cpu" else f" or on {x.device}"
            raise ValueError(f"seed is a {given}: give an int or a 0-d int64 tensor on the CPU{beside}.")
        if seed.device.type != "cpu":
            return
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}: give one that fits into int64.")
    remedy = "give the seed as a 0-d int64 tensor on the device, or leave dropout at 0"
    refuse_capture(x.device, "dropout with a seed on the host, which every replay would repeat", remedy)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a CUDA device is captured into a graph."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    with torch.cuda.device(device):  # torch tells it of the current device alone
        return torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str, remedy: str) -> None:
    """Raise RuntimeError, while a CUDA graph is captured, for what its replays would not repeat."""
    if is_capturing(device):
        raise RuntimeError(f"a CUDA graph cannot capture {what}: {remedy}.")


def check_places(name: str, tensor: Tensor) -> None:
    """Refuse to write in place to a matrix of which several elements share memory."""
    if not tensor.is_contiguous() and _overlaps(tensor):
        raise ValueError(f"{name} has several elements in one place of memory: give a contiguous copy.")


def _overlaps(matrix: Tensor) -> bool:
    """Whether two elements share memory: whether as many rows down as columns back lead to one place.

    With steps r and c they first do after c / gcd(r, c) rows and r / gcd(r, c) columns.
    """
    (rows, cols), (down, across) = matrix.shape, matrix.stride()
    common = math.gcd(down, across) or 1
    return across // common < rows and down // common < cols


def check_written(tensors: Sequence[Tensor], name: str = "factors") -> None:
    """`check_places` of each, and RuntimeError for a tensor given twice, for which two threads would race."""
    for i, tensor in enumerate(tensors):
        check_places(f"{name}[{i}]", tensor)
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    if len(set(addresses)) < len(addresses):
        raise RuntimeError("a tensor appears twice among the factors of an in-place call; give each of them once.")
