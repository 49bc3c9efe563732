"""A job, the interface of what runs jobs, and the engine that runs them here, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from atp.ground.errors import NotReached

Say = Callable[[str], None]
Work = Callable[[Say], object]


@dataclass(frozen=True)
class Job:
    """A piece of work that writes its results to files, and resumes by itself when it is run again.

    name: in messages. work: takes a function that prints a line; picklable, so that it can run elsewhere. finished: all
    results are there, so that `work` only looks at them.
    """

    name: str
    work: Work
    finished: bool = False


Ended = Generator[tuple[Job, str | None], None, None]
"""Jobs as they end, each with the promise that it broke (`NotReached`) or None."""


class Engine(Protocol):
    """Runs jobs."""

    elsewhere: bool
    """Whether jobs may run on other machines than this one, so that what is measured here says nothing of them."""

    def results(self, jobs: Sequence[Job]) -> Ended:
        """Runs the jobs and yields each when it has ended.

        Raises `InputError`, `Interrupted`, or whatever else ended a job. Ends all jobs that still run when the caller
        closes the iterator or an error ends it.
        """


def carry_out(engine: Engine, jobs: Sequence[Job], write: Callable[[dict[str, str]], dict[str, Any]]) -> dict[str, Any]:
    """Runs the jobs, writes the results after each of them, and returns what was written last.

    write: takes what broke a promise so far, {name of the job: reason}; it runs in the main process. Raises as the
    engine does, and at the end `NotReached` with all broken promises.
    """
    from atp.processes import processes  # seconds, which choosing an engine does not take

    broken: dict[str, str] = {}
    content: dict[str, Any] = {}
    with closing(engine.results(jobs)) as ended:
        for job, promise in ended:
            if promise is not None:
                broken[job.name] = promise
            content = processes.on_main(lambda: write(broken))
    if broken:
        raise NotReached("; ".join(f"{name}: {reason}" for name, reason in broken.items()))
    return content


class Here:
    """Runs jobs in this process, one after the other."""

    elsewhere = False

    def __init__(self, say: Say = print) -> None:
        self.say = say

    def results(self, jobs: Sequence[Job]) -> Ended:
        """See `Engine`. The first error ends it."""
        for job in jobs:
            broken = None
            try:
                job.work(self.say)
            except NotReached as error:
                broken = str(error)
            yield job, broken
