"""What keeps a run safe: signals end it with a checkpoint, non-finite gradients never reach the weights."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType
from typing import Self

import torch
from torch import nn

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
    """Drops the gradients of a step when any is not finite, counts such steps, and ends the run after K in a row."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self._in_a_row = 0

    def check(self, parameters: Iterable[nn.Parameter], where: str) -> bool:
        """True when the optimizer may step. With gradients set to None AdamW leaves weights and moments alone."""
        owners = [p for p in parameters if p.grad is not None]
        finite = bool(torch.isfinite(torch.stack(torch._foreach_norm([p.grad for p in owners])).sum()))
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if not finite:
            self.skipped += 1
            for parameter in owners:
                parameter.grad = None
            if self._in_a_row >= self.limit:
                raise NotReached(
                    f"{self._in_a_row} steps in a row had a non-finite gradient, the last one at {where}: lower "
                    "training.lr or check that batch; the last checkpoint is good"
                )
        return finite
