"""`training.metrics_file`: the state of a run as a Prometheus text file, for node_exporter's textfile collector."""

from __future__ import annotations

import math
import os
import resource
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atp.ground.errors import InputError, shorten
from atp.ground.files import check_writable, whole_file
from atp.processes import processes
from atp.training.callbacks import Callback, Record

if TYPE_CHECKING:
    from atp.training.loop import Loop

_FIRST = "# HELP atp_"
_HELP = {
    "step": "Finished LoRA steps.",
    "steps": "LoRA steps of the whole run.",
    "loss": "Mean loss per scored token since the last record.",
    "kept": "Share of the decoder's parameters that the mask of the last step keeps.",
    "tokens_per_second": "Trained tokens per second in this phase.",
    "memory_bytes": "Memory of the main process: allocated on its GPU, or resident where there is none.",
    "skipped_steps": "Steps skipped for a gradient that was not finite.",
    "checkpoint_age_seconds": "Seconds since the last checkpoint was written, when this file was.",
    "written_timestamp_seconds": "When this file was written.",
}


class MetricsFile(Callback):
    """Writes the file at every record and checkpoint, in one step, in the main process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._record: Record = {}
        self._saved: float | None = None

    def on_phase(self, loop: Loop) -> None:
        self._write(loop)

    def on_step(self, loop: Loop, record: Record | None) -> None:
        if record is not None:
            self._record = record
            self._write(loop)

    def on_checkpoint(self, loop: Loop, folder: Path) -> None:
        self._saved = time.time()
        self._write(loop)

    def _write(self, loop: Loop) -> None:
        if not processes.is_main():
            return
        now = time.time()
        values = {
            "step": loop.step,
            "steps": loop.phases.total,
            "loss": self._record.get("loss"),
            "kept": self._record.get("keep"),
            "tokens_per_second": self._record.get("tokens_per_second"),
            "memory_bytes": memory_bytes(loop.device),
            "skipped_steps": loop.finite.skipped,
            "checkpoint_age_seconds": None if self._saved is None else now - self._saved,
            "written_timestamp_seconds": now,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        labels = {"run": loop.config.output_dir, "phase": loop.phase}
        # The collector reads all files whose names end in .prom.
        with whole_file(self.path, ending="metrics") as temporary:
            temporary.write_text(exposition(values, labels), encoding="utf-8")


def exposition(values: dict[str, float | None], labels: dict[str, str]) -> str:
    """Gauges in Prometheus' text format 0.0.4, those that are None left out. values: keys of the table of gauges."""
    told = "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"
    lines = []
    for name, value in values.items():
        if value is not None:
            lines += [f"# HELP atp_{name} {_HELP[name]}", f"# TYPE atp_{name} gauge"]
            lines.append(f"atp_{name}{told} {_number(value)}")
    return "\n".join(lines) + "\n"


def check_metrics_file(path: str | None) -> None:
    """Raises `InputError` for a place where no such file can be written, or where another file would be lost."""
    if path is None:
        return
    file, key = Path(path), "training.metrics_file"
    if os.path.isdir(file):  # pathlib raises where a name is too long
        raise InputError(f"{key} {shorten(path)} is a folder: give the name of a file in it")
    check_writable(file.parent, key)
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{key} {shorten(path)} is no regular file: give another name")
        foreign = found.st_size > 0 and not file.read_bytes().startswith(_FIRST.encode())
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{key} {shorten(path)} cannot be used ({error.strerror}): give another file") from None
    if foreign:
        raise InputError(f"{key} {shorten(path)} is another file, which would be overwritten: give another name")


def memory_bytes(device: torch.device) -> int:
    """Bytes allocated on a GPU; on a CPU those resident, or where the system does not tell, the most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else f"{'+' if value > 0 else '-'}Inf"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
