"""Finds and names NaN and infinity before they are trained on or written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from atp.ground.errors import InputError, NotReached
from atp.processes import processes
from atp_kernels.quantized import dense


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape, dtype and device holds no NaN and no infinity. Waits for the device."""
    tensor = dense(tensor.to_local() if hasattr(tensor, "to_local") else tensor)  # of a sharded one what is here
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # One pass without a copy; both ends are NaN if any element is.
    return all(math.isfinite(end) for end in tensor.detach().aminmax())


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first name whose tensor holds NaN or infinity, or None."""
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)


def refuse_weights(model: nn.Module) -> None:
    """Raises `InputError` naming a parameter or buffer that holds NaN or infinity."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    name = first_non_finite(tensors.items())
    if processes.sharded():
        name = processes.any_of(name)  # each looks at its own rows
    if name is not None:
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        raise InputError(
            f"model weight {name} holds NaN or infinity in {dtype}: set model.dtype to one that can hold it, or repair "
            "the model's files"
        )


def non_finite_figures(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yields (key.path, value) of every NaN or infinity in nested dictionaries and lists."""
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


class FiniteGuard:
    """Skips steps with non-finite gradients, counts them, and ends the run after K in a row.

    The counts are tensors on the device: a step only writes them; `report`, `finish`, `skipped` and `state` read them.
    """

    def __init__(self, limit: int, steps: str = "steps") -> None:
        """limit: K. steps: what a message calls them."""
        self.limit, self.steps = limit, steps
        self.restore({"skipped": 0, "in_a_row": 0, "last": 0})

    def restore(self, state: dict[str, int]) -> None:
        """The inverse of `state`."""
        self._skipped, self._in_a_row, self._last = (torch.tensor(state[k]) for k in ("skipped", "in_a_row", "last"))
        self._longest = self._in_a_row

    def state(self) -> dict[str, int]:
        """The counts, for JSON."""
        return {"skipped": self.skipped, "in_a_row": int(self._in_a_row), "last": int(self._last)}

    @property
    def skipped(self) -> int:
        """Number of steps skipped so far."""
        return int(self._skipped)

    def check(self, optimizer: torch.optim.Optimizer, step: int, beside: Iterable[nn.Parameter] = ()) -> Tensor:
        """Call before the step of a fused optimizer: if a gradient is not finite, that step changes nothing.

        beside: parameters of another optimizer whose gradients count too. Returns whether the step is skipped, scalar
        bool on the device.
        """
        parameters = [*(p for group in optimizer.param_groups for p in group["params"]), *beside]
        gradients = [p.grad for p in parameters if p.grad is not None]
        bad = ~torch.isfinite(nn.utils.get_total_norm(gradients, norm_type=math.inf))
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # fused optimizers read it
        self._skipped = self._skipped + bad
        self._in_a_row = (self._in_a_row + 1) * bad
        self._longest = torch.maximum(self._longest, self._in_a_row)
        self._last = torch.where(bad, step, self._last)
        return bad

    def report(self) -> None:
        """Raises `NotReached` if K steps in a row were skipped since the last report."""
        if int(self._longest) >= self.limit:
            self._stop(int(self._longest))
        self._longest = self._in_a_row

    def finish(self, count: int) -> None:
        """`report` at the end of `count` steps; also raises if there were fewer than K and all were skipped."""
        self.report()
        if 0 < count <= int(self._in_a_row):
            self._stop(count)

    def _stop(self, count: int) -> NoReturn:
        raise NotReached(
            f"{count} {self.steps} in a row had a non-finite gradient, the last one at step {int(self._last)}: start "
            "again with a lower learning rate or training.precision=float32, or check that batch; the last checkpoint "
            "is good"
        )
