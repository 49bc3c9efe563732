"""Jobs on a Ray cluster, or on the processors and GPUs of this machine where none is running."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ray
from ray.exceptions import RayError

from atp.ground.errors import InputError, reason
from atp.studies.engines.away import POLL_SECONDS, Away, AwayWork, Outcome
from atp.studies.engines.engine import Say


class Ray(Away):
    """Jobs as Ray tasks. Ray starts a job again whose machine has failed, and the run resumes."""

    def __init__(self, resources: dict[str, Any], at_once: int | None, say: Say) -> None:
        """resources: what `ray.remote` takes for one task, as num_cpus, num_gpus, memory.

        Raises `InputError` for unknown ones.
        """
        super().__init__(say, at_once)
        self.resources = resources
        try:
            ray.remote(**resources)(_call) if resources else ray.remote(_call)
        except (TypeError, ValueError) as error:
            raise InputError(f"--on ray: {reason(error)}") from None

    def _submit(self, name: str, work: AwayWork) -> Any:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, configure_logging=False)
        task: Any = ray.remote(**self.resources)(_call) if self.resources else ray.remote(_call)
        return task.options(name=name).remote(work)

    def _where(self, handle: Any) -> str:
        return f"Ray task {handle.task_id().hex()}"

    def _ended(self, handles: Collection[Any]) -> list[Any]:
        return ray.wait(list(handles), timeout=POLL_SECONDS)[0]

    def _outcome(self, handle: Any) -> Outcome:
        try:
            return ray.get(handle)
        except RayError as error:
            return Outcome("failed", reason(error))

    def _cancel(self, handle: Any) -> None:
        ray.cancel(handle)


def _call(work: AwayWork) -> Outcome:
    return work()
