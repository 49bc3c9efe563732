"""Where NaN and infinity are found and named, before they are trained on or written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from atp.errors import InputError


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape, dtype and device holds no NaN and no infinity. Waits for the device."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # One pass without a copy; both ends are NaN if any element is.
    return all(math.isfinite(end) for end in tensor.detach().aminmax())


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first of these names whose tensor holds NaN or infinity; None if there is none."""
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)


def refuse_weights(model: nn.Module) -> None:
    """Raises `InputError` with the name of a parameter or buffer that holds NaN or infinity."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    name = first_non_finite(tensors.items())
    if name is not None:
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        raise InputError(
            f"model weight {name} holds NaN or infinity in {dtype}: set model.dtype to one that can hold it, or repair "
            "the model's files"
        )


def non_finite_figures(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(key.path, value) of every number in nested dictionaries and lists that is NaN or infinite."""
    if isinstance(values, dict):
        values = values.items()
    elif isinstance(values, (list, tuple)):
        values = enumerate(values)
    else:
        if isinstance(values, float) and not math.isfinite(values):
            yield path, values
        return
    for key, value in values:
        yield from non_finite_figures(value, f"{path}.{key}" if path else str(key))
