"""What keeps a run safe: signals end it with a checkpoint, non-finite gradients never reach the weights."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

import torch

from atp.errors import NotReached


class SignalGuard:
    """Turns the first SIGINT or SIGTERM inside a with block into a flag; a second one acts as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()


class FiniteGuard:
    """Keeps non-finite gradients out of weights and moments, counts such steps, and ends the run after K in a row.

    The counts are tensors on the device: a step writes them, and only `report`, `skipped` and `restore` read.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.restore(0)

    def restore(self, skipped: int) -> None:
        """Starts from a number of skipped steps."""
        self._skipped = torch.tensor(skipped)
        self._in_a_row = self._longest = self._last = torch.tensor(0)

    @property
    def skipped(self) -> int:
        """Steps that were not applied so far."""
        return int(self._skipped)

    def check(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Before the step of a fused optimizer: makes it a step that changes nothing if a gradient is not finite."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = ~torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum())
        optimizer.found_inf = bad.float()
        self._skipped = self._skipped + bad
        self._in_a_row = (self._in_a_row + 1) * bad
        self._longest = torch.maximum(self._longest, self._in_a_row)
        self._last = torch.where(bad, step, self._last)

    def report(self) -> None:
        """Raises `NotReached` if since the last report K steps in a row were skipped."""
        if int(self._longest) >= self.limit:
            raise NotReached(
                f"{int(self._longest)} steps in a row had a non-finite gradient, the last one at step "
                f"{int(self._last)}: lower training.lr or check that batch; the last checkpoint is good"
            )
        self._longest = self._in_a_row
