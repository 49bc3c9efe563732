"""How a command tells of its progress: on a terminal bars and a moving sign, else lines of text; JSON with --json-logs,
and nothing with --quiet.

Only `atp.cli.cli` opens a log (`logged`). Without one, as in a program that imports the package, only bars are shown.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from rich import get_console
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from atp.ground import ranks
from atp.ground.errors import visible
from atp.ground.redact import redacted

_QUIET_SECONDS = 20.0  # after which a line says that work goes on; readers are promised one every 30 s
_open: ContextVar[_Log | _Sign | _Silence | None] = ContextVar("_open", default=None)


class _Log:
    """Lines of one command, and a thread that writes one when the command has been quiet for long."""

    def __init__(self, as_json: bool, quiet_seconds: float, stdout_taken: bool) -> None:
        self.as_json, self.quiet_seconds, self.stdout_taken = as_json, quiet_seconds, stdout_taken
        self.phase, self.done = "", ""
        self.begun = self.written = time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._say_that_work_goes_on, name="atp progress", daemon=True)

    def write(self, text: str, **facts: Any) -> None:
        """One line, at once. text: for people; facts: for programs, beside time and phase."""
        now = datetime.now(UTC)
        if self.as_json:
            known = {"time": now.isoformat(timespec="milliseconds"), "phase": self.phase, **facts}
            line, stream = json.dumps({name: _finite(value) for name, value in known.items()}), sys.stderr
        else:
            line = f"{now.astimezone():%H:%M:%S} {text}"
            stream = sys.stderr if self.stdout_taken else sys.stdout
        self.written = time.monotonic()
        stream.write(visible(redacted(line)) + "\n")
        stream.flush()

    def begin(self, phase: str) -> None:
        if phase != self.phase:
            self.phase, self.done, self.begun = phase, "", time.monotonic()
            self.write(phase)

    def end(self) -> None:
        self.phase = ""

    def _say_that_work_goes_on(self) -> None:
        while not self.ended.wait(self.quiet_seconds / 10):
            if not self.phase or time.monotonic() - self.written < self.quiet_seconds:
                continue
            seconds = round(time.monotonic() - self.begun)
            done = {"done": self.done} if self.done else {}
            with suppress(OSError, ValueError):  # nobody reads any more, which the command itself will notice
                self.write(f"{self.phase} {self.done}".rstrip() + f", for {seconds} s so far", seconds=seconds, **done)


class _Sign:
    """What a terminal shows while a phase has no bars: its name, a moving sign and how long it has taken."""

    as_json = False

    def __init__(self, console: Console) -> None:
        self.console, self.phase, self.done = console, "", ""
        self.shown: Progress | None = None
        self.bars = 0  # that are shown in its place

    def begin(self, phase: str) -> None:
        if phase != self.phase:
            self.hide()
            self.phase = phase
            self.show()

    def end(self) -> None:
        self.hide()
        self.phase = ""

    def write(self, text: str, **facts: Any) -> None:
        """Nothing: bars say it."""

    def show(self) -> None:
        if self.phase and self.shown is None and not self.bars:
            columns = (SpinnerColumn(), _name(), TimeElapsedColumn())
            self.shown = Progress(*columns, console=self.console, transient=True)
            self.shown.add_task(self.phase, total=None)
            self.shown.start()

    def hide(self) -> None:
        if self.shown is not None:
            self.shown.stop()
            self.shown = None


def _name() -> TextColumn:
    return TextColumn("{task.description}", markup=False)  # it may hold the name of a folder, which is no markup


def _columns() -> tuple[ProgressColumn, ...]:
    """Those of rich by default, but for the name."""
    return _name(), *Progress.get_default_columns()[1:]


class _Silence:
    """What is told where nobody wants to hear it."""

    as_json = False
    done = ""

    def begin(self, phase: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def write(self, text: str, **facts: Any) -> None:
        """Nothing."""


class Bars(Progress):
    """Bars that stand still for no second: beside their own columns a moving sign and the time so far.

    A column `PHASE` shows what the command is doing. On a terminal they take the place of the log's sign; elsewhere
    there are none, because the log has lines.
    """

    def __init__(self, *columns: ProgressColumn, **options: Any) -> None:
        """columns: those of rich by default. options: as for rich's `Progress`."""
        sign = _open.get()
        self._sign = sign if isinstance(sign, _Sign) else None
        named = [_Phase(self._sign) if column is PHASE else column for column in columns or _columns()]
        console = options.pop("console", get_console() if self._sign is None else self._sign.console)
        disable = options.pop("disable", False) or isinstance(sign, _Silence) or not console.is_terminal
        super().__init__(SpinnerColumn(), *named, TimeElapsedColumn(), console=console, disable=disable, **options)

    def start(self) -> None:
        """Shows the bars."""
        if self._sign is not None and not self.disable and not self.live.is_started:
            self._sign.bars += 1
            self._sign.hide()
        super().start()

    def stop(self) -> None:
        """Leaves them as they are, or removes them if they are transient."""
        ended = self.live.is_started
        super().stop()
        if self._sign is not None and not self.disable and ended:
            self._sign.bars -= 1
            self._sign.show()


class _Phase(ProgressColumn):
    """The phase under way, or without a terminal's sign the description of the task."""

    def __init__(self, sign: _Sign | None = None) -> None:
        super().__init__()
        self.sign = sign

    def render(self, task: Task) -> Text:
        """For rich."""
        return Text(f"{self.sign.phase if self.sign is not None else task.description:>8}")


PHASE = _Phase()


@contextmanager
def logged(
    as_json: bool,
    quiet_seconds: float = _QUIET_SECONDS,
    console: Console | None = None,
    *,
    quiet: bool = False,
    stdout_taken: bool = False,
) -> Iterator[None]:
    """Writes lines of progress while the block runs, in the main process.

    as_json: one JSON object per line on stderr; else text on stdout, and none where that is a terminal, which shows
    bars and, on `console`, a sign while there are none. quiet_seconds: of a phase without a line, after which one says
    that it goes on. quiet: neither lines nor bars nor a sign. stdout_taken: by a result that a program reads, so lines
    of text go to stderr.
    """
    if not ranks.is_main():
        yield
        return
    if quiet:
        before = _open.set(_Silence())
        try:
            yield
        finally:
            _open.reset(before)
        return
    if not as_json and sys.stdout.isatty():
        if console is None or not console.is_terminal:
            yield
            return
        sign = _Sign(console)
        before = _open.set(sign)
        try:
            yield
        finally:
            _open.reset(before)
            sign.hide()
        return
    log = _Log(as_json, quiet_seconds, stdout_taken)
    before = _open.set(log)
    log.thread.start()
    try:
        yield
    finally:
        _open.reset(before)
        log.ended.set()
        log.thread.join()


def begin(phase: str) -> None:
    """A part of the work begins: a line, unless it is the one that goes on already."""
    log = _open.get()
    if log is not None:
        log.begin(phase)


def end() -> None:
    """The work is done: what follows is its result, beside which nothing moves."""
    log = _open.get()
    if log is not None:
        log.end()


def step(phase: str, record: dict[str, Any], total: int) -> None:
    """A logged step of `total`. record: a line of metrics.jsonl, of which `note` shows a part."""
    log = _open.get()
    if log is not None:
        log.begin(phase)
        facts = {"step": record["step"], "steps": total, "loss": record["loss"], "kept": record.get("keep")}
        facts["tokens_per_second"] = record["tokens_per_second"]
        log.write(f"{phase} {record['step']}/{total}  {note(record)}", **facts)


def count(done: int, total: int) -> None:
    """How far the phase has come; shown when it has been quiet for long."""
    log = _open.get()
    if log is not None:
        log.done = f"{done}/{total}"


def error(sentence: str) -> bool:
    """Writes the sentence that a command ends with as JSON; False, and nothing done, where no JSON is asked for."""
    log = _open.get()
    if isinstance(log, _Sign):
        log.hide()
    if log is None or not log.as_json:
        return False
    log.write(sentence, error=sentence)
    return True


def saying(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say`, whose messages are lines of a JSON log too."""

    def both(message: str) -> None:
        say(message)
        log = _open.get()
        if log is not None and log.as_json:
            log.write(message, message=message)

    return both


def note(record: dict[str, Any]) -> str:
    """Loss, share kept and speed of a record, for people."""
    kept = f"  kept {record['keep']:.3f}" if "keep" in record else ""
    return f"loss {record['loss']:.3f}{kept}  {record['tokens_per_second']:,.0f} tok/s"


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
