"""What a run records while it trains: one JSON line per logged step, and time and tokens by phase."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atp.ground import progress
from atp.ground.files import append, write_text
from atp.processes import processes


class MetricsLog:
    """Appends records to metrics.jsonl; resuming first drops records past the checkpoint's step.

    Only the main process touches the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> int:
        """Keeps the records up to and including `step`; returns how many damaged lines it dropped.

        The file is then one of our own, also where it was a link or a pipe.
        """
        if not processes.is_main() or not os.path.lexists(self.path):
            return 0
        kept, damaged = [], 0
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        for line in lines:
            try:
                record = json.loads(line)
                if int(record["step"]) <= step:
                    kept.append(json.dumps(record) + "\n")
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                damaged += 1
        write_text(self.path, "".join(kept))
        return damaged

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record."""
        if not processes.is_main():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append(self.path, json.dumps(record) + "\n")


class PhaseClock:
    """Seconds and trained tokens (padding left out) by phase; survives a resume through `state`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}

    def add(self, phase: str, seconds: float, tokens: int = 0) -> None:
        """Counts time and tokens towards a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.tokens[phase] = self.tokens.get(phase, 0) + tokens

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Counts the seconds of a with block towards a phase."""
        progress.begin(phase)
        started = time.perf_counter()
        yield
        self.add(phase, time.perf_counter() - started)

    def rate(self, phase: str) -> float:
        """Trained tokens per second in a phase, 0 where nothing was trained."""
        return self.tokens.get(phase, 0) / self.seconds[phase] if self.seconds.get(phase) else 0.0

    def record(self, phase: str) -> dict[str, float]:
        """The figures of a phase in a record."""
        return {
            "tokens_per_second": self.rate(phase),
            "phase_tokens": self.tokens[phase],
            "phase_seconds": self.seconds[phase],
        }

    def state(self) -> dict[str, dict[str, float]]:
        """A copy, for JSON."""
        return {"seconds": dict(self.seconds), "tokens": dict(self.tokens)}

    def load(self, state: dict[str, dict[str, Any]]) -> None:
        """The inverse of `state`."""
        self.seconds, self.tokens = dict(state["seconds"]), dict(state["tokens"])
