"""Run folders below a folder, with their figures, read without torch: for `atp runs`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from atp.ground.errors import InputError, shorten
from atp.ground.locking import holder
from atp.ground.reading import parse_json

State = Literal["running", "finished", "stopped"]
_CONFIG, _METRICS, _SUMMARY, _SCORES = "config.yaml", "metrics.jsonl", "summary.json", "evaluation.json"
_SHARED = "shared.json"
_RECORDS = {_METRICS, _SUMMARY, _SCORES, "inputs.json"}  # one of which a run leaves beside its config
_TAIL = 65_536  # bytes of metrics.jsonl, which hold its last record
_LARGEST = 2**26  # bytes of a JSON file that is read


@dataclass(frozen=True)
class RunLine:
    """One run folder. Figures are None as long as the run has none.

    counted: which tokens the perplexities count.
    stopped: neither finished nor under way; `--resume` goes on with it. changed: when its newest record was written.
    """

    folder: str
    state: State
    phase: str | None
    step: int | None
    loss: float | None
    kept: float | None
    perplexity_before: float | None
    perplexity: float | None
    counted: str | None
    megabytes: float | None
    minutes: float | None
    changed: datetime

    def as_json(self) -> dict[str, Any]:
        """The same for a program; times in ISO 8601."""
        return asdict(self) | {"changed": self.changed.isoformat(timespec="seconds")}


def runs_below(folder: Path) -> list[RunLine]:
    """All run folders in a folder, itself included, by name; those of comparisons and sweeps too.

    Damaged records count as missing ones. Raises `InputError` if the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"folder {shorten(folder)} does not exist: give one that holds run folders")
    return [run_line(path) for path in _folders(folder)]


def _folders(top: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(top):
        if _CONFIG in files and _RECORDS.intersection(files):
            inside.clear()  # what a run keeps, such as its tuned dense model, is no run
            if _SHARED not in files:  # nor is what the runs of a sweep start from, once it is done
                yield Path(folder)
        inside[:] = sorted(name for name in inside if not name.startswith("."))


def run_line(folder: Path) -> RunLine:
    """What a run folder holds so far. Damaged records count as missing ones."""
    summary, scores, last = _json(folder / _SUMMARY), _json(folder / _SCORES), _last(folder / _METRICS)
    state: State = "running" if holder(folder) is not None else "finished" if summary else "stopped"
    times = [path.stat().st_mtime for name in (*_RECORDS, _CONFIG) if (path := folder / name).is_file()]
    seconds = _number(_within(summary, "seconds", "total"))
    return RunLine(
        folder=str(folder),
        state=state,
        phase=_text(last.get("phase")),
        step=step if type(step := last.get("step")) is int else None,
        loss=_number(last.get("loss")),
        kept=_number(summary.get("keep_decoder", last.get("keep"))),
        perplexity_before=_number(_within(scores, "original", "perplexity")),
        perplexity=_number(_within(summary, "perplexity", "final")),
        counted=_text(_within(scores, "original", "counted")),
        megabytes=_number(_within(summary, "megabytes", "final")),
        minutes=None if seconds is None else seconds / 60,
        changed=datetime.fromtimestamp(max(times, default=0.0), UTC),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8")) if path.stat().st_size < _LARGEST else None
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def _last(path: Path) -> dict[str, Any]:
    """The newest values in metrics.jsonl, back to those of a training step: its last record may be a validation score.

    A run under way may have written half a line after it.
    """
    newest: dict[str, Any] = {}
    try:
        with path.open("rb") as lines:
            lines.seek(max(path.stat().st_size - _TAIL, 0))
            tail = lines.read(_TAIL).decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(tail):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            newest = record | newest
        if "loss" in newest:
            break
    return newest


def _within(values: dict[str, Any], *names: str) -> Any:
    found: Any = values
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return shorten(value, 20) if isinstance(value, str) else None
