"""Stops a run on a signal at a point from which it can resume."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from atp.ground.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalGuard:
    """Ends a with block on the first SIGINT, SIGTERM or SIGHUP; a second one acts as without a guard.

    at_once: raise `Interrupted` immediately; otherwise the signal only sets `received`, which the block must check.
    Guards nest; the innermost acts. Outside the main thread, which alone handles signals, a guard does nothing.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                # nohup ignores SIGHUP so that the run outlives its terminal.
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
