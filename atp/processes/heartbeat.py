"""Notices a process of a run that is no longer heard of, because its machine or network is gone.

A process that ends or is killed closes its connections, and the others see it at once. A machine without power closes
nothing, and the others would wait for it for as long as a wait may take. So every process counts up a number in the
store through which they met, and reads those of the others. Where one stands still for too long, or the store no longer
answers, this process ends as if it were killed: whatever it was doing, its last checkpoint is on disk.
"""

from __future__ import annotations

import atexit
import contextvars
import math
import os
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

from atp.ground import progress
from atp.ground.errors import InputError, quote

SECONDS = "ATP_LOST_AFTER"
_DEFAULT = 300.0  # more than any operation keeps the other threads of a healthy process from running
_BEATS = 60  # in that time
_ENDED = "ended"
_LEAVING = 2.0  # seconds in which a store takes a last word, where it answers at all
_CODE = 3  # as where a peer is seen to end


class Heartbeat:
    """Two threads: one beats and listens, and one watches both it and the others.

    Time is counted in beats of one's own: a process that was stopped, or whose machine slept, finds nobody late.
    """

    def __init__(self, store: Store, rank: int, count: int, seconds: float, lost: Callable[[str], None]) -> None:
        """seconds: of silence after which `lost` is called with a sentence, in a thread."""
        self.store, self.rank, self.lost = store, rank, lost
        self.seconds, self.every = seconds, seconds / _BEATS
        self.others = [other for other in range(count) if other != rank]
        self.heard: dict[int, str] = {}  # what the others last said
        self.silent = dict.fromkeys(self.others, 0)  # beats since they said something new
        self.unanswered = 0  # of our own, since the store last answered
        self.stopped = threading.Event()
        self.threads: list[threading.Thread] = []
        self._say("0")

    def start(self) -> None:
        """Begins to beat, once every process has been made one; ends with the process, or with `stop`."""
        for work in (self._beat, self._watch):
            # Within the caller's context, where the log of the command is.
            run = contextvars.copy_context().run
            self.threads.append(threading.Thread(target=run, args=(work,), name="atp heartbeat", daemon=True))
            self.threads[-1].start()

    def stop(self) -> None:
        """Tells the others that this process ends, so that they do not take it for lost."""
        self.stopped.set()
        for thread in self.threads:
            thread.join(_LEAVING)

    def _say(self, what: str) -> None:
        self.store.set(str(self.rank), f"{what} {socket.gethostname()}")

    def _beat(self) -> None:
        try:
            beats = 0
            while not self.stopped.wait(self.every):
                beats += 1
                self._say(str(beats))
                said = self.store.multi_get([str(other) for other in self.others])
                self.unanswered = 0
                for other, words in zip(self.others, map(bytes.decode, said), strict=True):
                    ended = words.startswith(_ENDED)
                    self.silent[other] = 0 if ended or words != self.heard.get(other) else self.silent[other] + 1
                    self.heard[other] = words
            self._say(_ENDED)
        except (DistStoreError, RuntimeError):
            # Who holds the store has ended and closed it, which whoever waits for them is told too.
            self.stopped.set()

    def _watch(self) -> None:
        while not self.stopped.wait(self.every):
            self.unanswered += 1
            late = next((other for other, beats in self.silent.items() if beats > _BEATS), None)
            if late is None and self.unanswered <= _BEATS:
                continue
            self.stopped.set()
            host = self.heard.get(late or 0, "").partition(" ")[2]
            who = f"process {late}" if late is not None else "the machine where the processes of this run meet"
            self.lost(
                f"nothing was heard of {who}{f' on {host}' if host else ''} for {self.seconds:,.0f} s ({SECONDS}): "
                "see whether its machine and the network are up, then continue with --resume"
            )


def begin(name: str, rank: int, count: int, ready: Callable[[], None]) -> None:
    """Starts the heartbeat of this process where torchrun or accelerate says at which address the processes met.

    name: the same in all processes of this start, and in no other. ready: returns once all have called it. Raises
    `InputError` for a variable ATP_LOST_AFTER that is no number of seconds; 0 turns the heartbeat off.
    """
    seconds = _seconds()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if seconds == 0 or not (address and port):
        return
    # A connection of its own: where the store hangs, nothing but the heartbeat waits for it.
    store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=2 * seconds))
    heartbeat = Heartbeat(PrefixStore(f"atp/heartbeat/{name}", store), rank, count, seconds, _end)
    ready()
    heartbeat.start()
    atexit.register(heartbeat.stop)


def _seconds() -> float:
    text = os.environ.get(SECONDS, str(_DEFAULT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (seconds == 0 or 1 <= seconds < math.inf):
        raise InputError(f"{SECONDS} is {quote(text)}: give seconds from 1 on, or 0 to wait for lost machines")
    return seconds


def _end(sentence: str) -> None:
    if not progress.error(sentence):
        sys.stderr.write(f"error: {sentence}\n")
    sys.stderr.flush()
    os._exit(_CODE)  # the main thread may be in a call that nothing interrupts
