"""What keeps a run safe: signals end it so that it can go on, non-finite gradients never reach the weights."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NoReturn, Self

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

    The counts are tensors on the device: a step writes them, and only `report`, `finish`, `skipped` and `state` read.
    """

    def __init__(self, limit: int, steps: str = "steps") -> None:
        """limit: K. steps: what they are called in a message."""
        self.limit, self.steps = limit, steps
        self.restore({"skipped": 0, "in_a_row": 0, "last": 0})

    def restore(self, state: dict[str, int]) -> None:
        """The inverse of `state`."""
        self._skipped, self._in_a_row, self._last = (torch.tensor(state[k]) for k in ("skipped", "in_a_row", "last"))
        self._longest = self._in_a_row

    def state(self) -> dict[str, int]:
        """JSON-able counts."""
        return {"skipped": self.skipped, "in_a_row": int(self._in_a_row), "last": int(self._last)}

    @property
    def skipped(self) -> int:
        """Steps that were not applied so far."""
        return int(self._skipped)

    def check(
        self, optimizer: torch.optim.Optimizer, step: int, beside: Iterable[torch.nn.Parameter] = ()
    ) -> torch.Tensor:
        """Before the step of a fused optimizer: makes it a step that changes nothing if a gradient is not finite.

        beside: parameters that another optimizer steps, whose gradients count too. Returns whether the step is bad,
        scalar bool on the device.
        """
        parameters = [*(p for group in optimizer.param_groups for p in group["params"]), *beside]
        gradients = [p.grad for p in parameters if p.grad is not None]
        bad = ~torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum())
        optimizer.found_inf = bad.float()
        self._skipped = self._skipped + bad
        self._in_a_row = (self._in_a_row + 1) * bad
        self._longest = torch.maximum(self._longest, self._in_a_row)
        self._last = torch.where(bad, step, self._last)
        return bad

    def report(self) -> None:
        """Raises `NotReached` if since the last report K steps in a row were skipped."""
        if int(self._longest) >= self.limit:
            self._stop(int(self._longest))
        self._longest = self._in_a_row

    def finish(self, count: int) -> None:
        """`report` at the end of `count` steps; raises also if they are fewer than K and all of them were skipped."""
        self.report()
        if 0 < count <= int(self._in_a_row):
            self._stop(count)

    def _stop(self, count: int) -> NoReturn:
        raise NotReached(
            f"{count} {self.steps} in a row had a non-finite gradient, the last one at step {int(self._last)}: start "
            "again with a lower learning rate or training.precision=float32, or check that batch; the last checkpoint "
            "is good"
        )
