"""What keeps a run safe: signals end it so that it can go on, non-finite gradients never reach the weights."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import torch

from atp.errors import Interrupted, NotReached

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalGuard:
    """Ends a with block on the first SIGINT, SIGTERM or SIGHUP; a second one acts as it would without any guard.

    at_once: raise `Interrupted` wherever the block is; without it the signal only sets `received`, and the block looks
    there. Guards nest, and the innermost acts. Outside the main thread, which alone handles signals, it does nothing.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                # nohup ignores SIGHUP so that a run outlives its terminal.
                if not (signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN):
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(lambda signum, handler: handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self._restore(_usual)
        if self.at_once:
            raise Interrupted(signum)

    def _restore(self, which: Callable[[int, Any], Any]) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, which(signum, handler))
        self._previous.clear()


def _usual(signum: int, handler: Any) -> Any:
    """The handler from before the outermost guard."""
    guard = getattr(handler, "__self__", None)
    return _usual(signum, guard._previous[signum]) if isinstance(guard, SignalGuard) else handler


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
