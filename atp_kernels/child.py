"""Work in a child process, from which no crash, no hang and no poisoned CUDA context reaches the caller.

A `Child` calls one function, named as "module:function", with one job after another: (job, note) to a result, all of
which JSON can hold. A child that is lost takes its job with it; the next job starts another one.
"""

import faulthandler
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO, Any

Note = Callable[[str], None]
"""Says what a job is at, and starts its time anew."""

START_SECONDS = 300.0
"""For imports, which take minutes from a network drive."""
_GRACE = 10.0  # after which a child whose caller is gone ends itself
_END_SECONDS = 10.0  # a driver can hang where it is unloaded
_LONGEST_LINE = 300
_LONGEST_SECONDS = 86_400


class Lost(RuntimeError):
    """A job that was not finished. at: what it noted last, None where it never began; why: in words."""

    def __init__(self, why: str, at: str | None) -> None:
        super().__init__(why)
        self.at = at


class Child:
    """Runs a function in a process of its own. variables: of its environment, None for those that it must not have."""

    def __init__(self, function: str, variables: Mapping[str, str | None] | None = None) -> None:
        self.function = function
        # What is imported there must be what is imported here.
        changed = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), **(variables or {})}
        kept = {name: value for name, value in os.environ.items() if name not in changed}
        self._environment = kept | {name: value for name, value in changed.items() if value is not None}
        self._process: subprocess.Popen[str] | None = None
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._errors: IO[bytes] | None = None
        self._errors_before = 0  # the bytes there that no job of now has written

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def call(self, job: Any, seconds: float) -> Any:
        """The function's result for a job, which may take so long from the start and from each of its notes.

        Raises `Lost` where the function raised, the process ended or time ran out.
        """
        if self._process is None:
            self._start()
        process, at = self._process, ""
        assert process is not None and process.stdin is not None and self._errors is not None, "it was started"
        self._errors_before = os.fstat(self._errors.fileno()).st_size
        with suppress(OSError):  # it has ended, which its output tells
            process.stdin.write(json.dumps([job, seconds]) + "\n")
            process.stdin.flush()
        while True:
            said = self._next(seconds, at)
            if "result" in said:
                return said["result"]
            if "error" in said:
                self.close()
                raise Lost(said["error"], at)
            at = said["at"]

    def close(self) -> None:
        """End the process and all that it has started, as a compiler."""
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:  # else its number may be another's by now
                if hasattr(os, "killpg"):
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            with suppress(subprocess.TimeoutExpired):  # one that waits in a driver cannot even be killed
                process.wait(_END_SECONDS)
            for pipe in (process.stdin, self._errors):
                with suppress(OSError):
                    if pipe is not None:
                        pipe.close()

    def _start(self) -> None:
        code = f"from {__name__} import serve; serve({self.function!r})"
        try:
            self._errors = TemporaryFile()  # closed with the process
            # A session of its own, so that it can be ended with its children; -P: nothing from the current folder.
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                env=self._environment, text=True, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise Lost(f"no child process starts ({error.strerror})", None) from None
        self._process, self._said, self._errors_before = process, queue.SimpleQueue(), 0
        threading.Thread(target=_read, args=(process.stdout, self._said), daemon=True).start()
        self._next(START_SECONDS, None)

    def _next(self, seconds: float, at: str | None) -> dict[str, Any]:
        """What the child says next, if it does so in time."""
        try:
            said = self._said.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise Lost(f"it was not done after {seconds:g} s", at) from None
        if said is None:
            raise Lost(self._ended(), at)
        return said

    def _ended(self) -> str:
        assert self._process is not None and self._errors is not None, "it was started"
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.close()
            return "the process hung at its end"
        self._errors.seek(self._errors_before)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"the process ended with {how}" + (f" ({lines[-1].strip()[:_LONGEST_LINE]})" if lines else "")


def _read(lines: IO[str], said: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    with lines:
        for line in lines:
            with suppress(ValueError):  # half a line of a process that was ended
                said.put(json.loads(line))
    said.put(None)


def serve(function: str) -> None:
    """The child's side: jobs from stdin, answers to what was stdout; all else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    module, _, name = function.partition(":")
    called = getattr(importlib.import_module(module), name)
    tell(at="")
    for line in sys.stdin:
        job, seconds = json.loads(line)

        def note(at: str, seconds: float = seconds) -> None:
            # The caller ends a child that hangs. Where it has gone itself, nobody else frees the device.
            faulthandler.dump_traceback_later(seconds + _GRACE, exit=True)
            tell(at=at)

        note("")
        try:
            result = called(job, note)
        except Exception as error:
            tell(error=f"{type(error).__name__}: {one_line(error)}")
            return  # a CUDA context may be of no use any more
        faulthandler.cancel_dump_traceback_later()
        tell(result=result)


def check_seconds(seconds: float) -> None:
    """Refuse a time that no child can be given."""
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise ValueError(f"the timeout is {seconds}: give seconds above 0, at most {_LONGEST_SECONDS:,}.")


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or repr(error)).splitlines()[0][:_LONGEST_LINE]
