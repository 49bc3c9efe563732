"""Jobs in other processes: what runs there, and how an engine hands them out and waits for them."""

from __future__ import annotations

import os
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atp.ground import progress
from atp.ground.errors import InputError, Interrupted, JobsFailed, NotReached, reason
from atp.processes import processes
from atp.studies.engines.engine import Ended, Here, Job, Say, Work

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended elsewhere, and in words why."""

    how: Literal["done", "broken", "refused", "failed"]
    why: str = ""


class AwayWork:
    """The work of a job, to be called once in a process of its own. Never raises, so that its end reaches the caller.

    A process on another machine begins in a folder of its own; paths are those of where the job came from.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.folder = work, os.getcwd()

    def __call__(self) -> Outcome:
        """Does the work and says how it ended."""
        try:
            os.chdir(self.folder)
            with progress.logged(as_json=False):
                processes.start()
                self.work(_print)
        except NotReached as error:
            return Outcome("broken", str(error))
        except InputError as error:
            return Outcome("refused", str(error))
        except Interrupted as error:
            return Outcome("failed", f"interrupted by signal {error.signum}")
        except Exception as error:
            traceback.print_exc()
            return Outcome("failed", reason(error))
        return Outcome("done")


class Away(ABC):
    """Hands jobs out and waits. What one job breaks does not stop the others: their errors come at the end."""

    elsewhere = True

    def __init__(self, say: Say, at_once: int | None) -> None:
        """at_once: how many jobs may run or wait in the engine's queue at a time; None hands all of them out."""
        if processes.count() > 1:
            raise InputError(
                "--on starts processes itself: leave torchrun or accelerate launch out, and give each job several "
                "with --resource tasks_per_node=N"
            )
        self.say, self.at_once = say, at_once

    def results(self, jobs: Sequence[Job]) -> Ended:
        """See `Engine`. Raises `InputError` if a job was refused, and `JobsFailed` if one ended in another way."""
        yield from Here(self.say).results([job for job in jobs if job.finished])
        waiting = [job for job in jobs if not job.finished][::-1]
        running: dict[Any, Job] = {}
        lost: list[tuple[Job, Outcome]] = []
        try:
            while waiting or running:
                while waiting and (self.at_once is None or len(running) < self.at_once):
                    job = waiting.pop()
                    handle = self._submit(job.name, AwayWork(job.work))
                    running[handle] = job
                    self.say(f"{job.name}: {self._where(handle)}")
                progress.begin("waiting for runs")
                for handle in self._ended(running):
                    job, outcome = running.pop(handle), self._outcome(handle)
                    self.say(f"{job.name}: {outcome.how}{outcome.why and f', {outcome.why}'}")
                    if outcome.how in ("done", "broken"):
                        yield job, outcome.why or None
                    else:
                        lost.append((job, outcome))
        finally:
            for handle in running:
                self._cancel(handle)
        if lost:
            told = "; ".join(f"{job.name}: {outcome.why}" for job, outcome in lost)
            raise InputError(told) if all(o.how == "refused" for _, o in lost) else JobsFailed(told)

    @abstractmethod
    def _submit(self, name: str, work: AwayWork) -> Any:
        """Starts or queues the work; returns a handle that can be hashed."""

    @abstractmethod
    def _where(self, handle: Any) -> str:
        """A few words on the job's number and log."""

    @abstractmethod
    def _ended(self, handles: Collection[Any]) -> list[Any]:
        """Those that have ended; waits for `POLL_SECONDS` where there is none."""

    @abstractmethod
    def _outcome(self, handle: Any) -> Outcome:
        """How a job ended, also where its process ended without a word."""

    @abstractmethod
    def _cancel(self, handle: Any) -> None:
        """Ends a job that runs or waits."""


def paused(ended: list[Any]) -> list[Any]:
    """The argument, after a pause if it is empty."""
    if not ended:
        time.sleep(POLL_SECONDS)
    return ended


def _print(line: str) -> None:
    print(line, flush=True)
