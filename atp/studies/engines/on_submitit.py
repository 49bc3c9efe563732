"""Jobs through submitit: of a SLURM cluster, or processes of this machine.

submitit pickles a job into its folder, from where the job's process reads it: whoever can write there can run code as
the user, as with the scripts of any queue.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from atp.ground.errors import InputError, shorten
from atp.studies.engines.away import Away, AwayWork, Outcome, paused
from atp.studies.engines.engine import Say

_DAY = 24 * 60  # minutes
_COMMON = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")  # of all its clusters


class Submitit(Away):
    """Jobs on `slurm`, or as processes of this machine with `local`.

    A SLURM job that is preempted, or reaches its time, goes back to the queue and resumes.
    """

    def __init__(self, name: str, resources: dict[str, Any], at_once: int | None, logs: Path, say: Say) -> None:
        """resources: submitit's parameters; those of sbatch alone go without their prefix, as partition.

        Raises `InputError` for unknown ones, and where there is no SLURM.
        """
        if name == "local" and at_once is None:
            raise InputError("--on local needs --at-once N: how many runs this machine holds at a time")
        super().__init__(say, at_once)
        self.elsewhere = name == "slurm"
        self.logs = logs.absolute()
        self.cluster = name
        self.parameters = {"timeout_min": _DAY} | {
            key if key in _COMMON else f"{name}_{key}": value for key, value in resources.items()
        }
        try:
            with TemporaryDirectory() as folder:  # an executor makes its folder; nothing is written before all is known
                self._executor(Path(folder))
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            told = str(error).partition("\n")[0]
            raise InputError(f"--on {name}: {shorten(told)}") from None

    def _executor(self, folder: Path) -> submitit.AutoExecutor:
        executor = submitit.AutoExecutor(folder, cluster=self.cluster)
        executor.update_parameters(**self.parameters)
        return executor

    def _submit(self, name: str, work: AwayWork) -> submitit.Job[Outcome]:
        return self._executor(self.logs).submit(_Task(work))

    def _where(self, handle: submitit.Job[Outcome]) -> str:
        return f"job {handle.job_id}, {handle.paths.stdout}"

    def _ended(self, handles: Collection[Any]) -> list[Any]:
        return paused([handle for handle in handles if handle.done()])

    def _outcome(self, handle: submitit.Job[Outcome]) -> Outcome:
        try:
            return handle.results()[0]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError):
            return Outcome("failed", f"ended without a result, see {handle.paths.stderr}")

    def _cancel(self, handle: submitit.Job[Outcome]) -> None:
        handle.cancel(check=False)


class _Task:
    """What submitit calls in each process of a job."""

    def __init__(self, work: AwayWork) -> None:
        self.work = work

    def __call__(self) -> Outcome:
        if submitit.JobEnvironment().num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return self.work()

    def checkpoint(self) -> DelayedSubmission:
        """What SLURM queues again after a preemption: the same, for a run resumes from its own checkpoint."""
        return DelayedSubmission(self)
