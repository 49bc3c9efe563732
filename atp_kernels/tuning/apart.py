"""The candidates of a case in a child process: one that crashes or hangs is left out, and the others are timed.

On a GPU one that reads past its memory leaves a CUDA context in which no later one runs.
"""

from dataclasses import asdict
from typing import Any

import torch

from atp_kernels.call import shown
from atp_kernels.child import Child, Lost, Note
from atp_kernels.tuning.candidates import Case, Measured, candidates, measured
from atp_kernels.tuning.clock import clock
from atp_kernels.tuning.table import Entry, Key

SERVED = "atp_kernels.tuning.apart:served"


def measured_apart(child: Child, case: Case, rounds: int, seconds: float) -> Measured:
    """`measured` in a child that runs `served`; a candidate may take so long to be checked, and for each call.

    Raises `Lost` where no candidate is to blame.
    """
    lost: dict[str, str] = {}
    while True:
        job = {"case": _written(case), "rounds": rounds, "lost": lost}
        try:
            return _read(child.call(job, seconds))
        except Lost as error:
            if not error.at or error.at in lost:
                raise
            lost[error.at] = str(error)


def served(job: dict[str, Any], note: Note) -> dict[str, Any]:
    """The child's side of `measured_apart`."""
    case = _case_of(job["case"])
    if case.device.type == "cuda":
        torch.cuda.set_device(case.device)  # on whose stream the clock's events are
    found = {candidate.name: candidate for candidate in candidates(case)}
    entry, wrong, today = measured(case, found, clock(str(case.device)), job["rounds"], note=note, lost=job["lost"])
    return {"entry": asdict(entry), "wrong": wrong, "today": today}


def _written(case: Case) -> dict[str, Any]:
    return {**vars(case), "dtype": shown(case.dtype), "device": str(case.device)}


def _case_of(values: dict[str, Any]) -> Case:
    return Case(**values | {"dtype": getattr(torch, values["dtype"]), "device": torch.device(values["device"])})


def _read(found: dict[str, Any]) -> Measured:
    values = found["entry"]
    tile = tuple(values["tile"]) if isinstance(values["tile"], list) else values["tile"]
    entry = Entry(**values | {"key": Key(**values["key"]), "tile": tile})
    return Measured(entry, found["wrong"], found["today"])
