"""How a command ends: one sentence and an exit code for whatever went wrong."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType, TracebackType

from atp.ground import ranks
from atp.ground.errors import (
    PROCESS_ENDED,
    InputError,
    Interrupted,
    JobsFailed,
    NotReached,
    errno_of,
    is_disk_full,
    is_lost_peer,
    is_out_of_memory,
    reason,
    visible,
)
from atp.ground.redact import redacted
from atp.ground.requirements import TRAIN, find, is_known, missing

_BROKEN_PIPE = 128 + 13  # what a shell shows for a program that SIGPIPE ended
_INTERRUPTED = 128 + signal.SIGINT
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class OutputClosed(Exception):
    """The reader of our output has gone, as in `atp env | head -1`. No OSError, which typer would handle itself."""


def ending(error: BaseException) -> tuple[str, int]:
    """The sentence (empty if nobody is left to read it) and the exit code for an error."""
    if isinstance(error, ModuleNotFoundError) and is_known(error.name):
        error = missing(error)
    if isinstance(error, InputError):
        return _one_line(error), 2
    if ranks.count() > 1 and is_lost_peer(error):
        return PROCESS_ENDED, 3
    if isinstance(error, NotReached):
        return _one_line(error), 3
    if isinstance(error, JobsFailed):
        return _one_line(error), 1
    if isinstance(error, Interrupted):
        return _one_line(error), 128 + error.signum
    if hasattr(error, "format_message"):  # usage errors of typer or click
        context = getattr(error, "ctx", None)
        see = f": see {context.command_path} --help" if context else ""
        return f"{_one_line(error.format_message()).removesuffix('.')}{see}", 2
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return interrupted()
    if isinstance(error, OutputClosed) or (isinstance(error, OSError) and error.errno == errno.EPIPE):
        return "", _BROKEN_PIPE
    return _unforeseen(error), 1


def interrupted() -> tuple[str, int]:
    """Sentence and exit code after Ctrl-C where there is nothing to continue."""
    return "interrupted", _INTERRUPTED


def _unforeseen(error: BaseException) -> str:
    if is_out_of_memory(error):
        return f"out of memory ({reason(error)}): use smaller batches or a machine with more memory"
    if is_disk_full(error):
        return f"the disk is full ({reason(error)}): free some space and repeat the command, with --resume for a run"
    number = errno_of(error)
    if number is not None:
        remedy = "check its permissions" if number in _FORBIDDEN else "check the path"
        return f"cannot use a file or folder ({reason(error)}): {remedy}"
    return f"{_named(error)}: run again with --debug for the traceback"


def _named(error: BaseException) -> str:
    text, name = reason(error), type(error).__name__
    return text if text.startswith(name) else f"{name}: {text}"


def _one_line(message: object) -> str:
    return " ".join(line.strip() for line in str(message).splitlines())


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What --debug shows, as `sys.excepthook`: Python's own traceback without secrets and control characters."""
    sys.stderr.write(visible(redacted("".join(traceback.format_exception(kind, error, trace)))))


def open_closed_output() -> None:
    """Gives a command that was started with stdout or stderr closed, as by `>&-`, one that drops what it is told.

    Its number is taken as well where it is free: else the next file that is opened would get it, and with it whatever a
    library writes there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def flush_output() -> None:
    """Flushes stdout and stderr, or drops what is left if that fails, so that Python does not try again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_interrupted_imports() -> None:
    """Lets Ctrl-C end the command `atp` with a sentence while torch is still being imported, which takes seconds.

    Does nothing in other programs, or where the signal already has a handler. `atp.cli.cli.main` undoes it.
    """
    if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_without_packages(*names: str) -> None:
    """Raises `lacking` where any of these packages (import names; by default those of the extra `train`) is missing."""
    absent = [name for name in names or TRAIN if find(name) is None]
    if absent:
        raise lacking(ModuleNotFoundError(name=absent[0]))


def lacking(error: ModuleNotFoundError) -> ImportError:
    """The error to raise where `import atp` or the command finds a package of the extra `train` missing.

    The command ends here, with a sentence and code 2. A program gets an ImportError that it can catch; one that does
    not catch it ends with the sentence too, without a traceback. An error about any other module comes back as it is.
    """
    if not is_known(error.name):
        return error
    told = missing(error, *TRAIN)
    if is_command():
        sys.stderr.write(f"error: {told}\n")
        sys.exit(ending(told)[1])
    show = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if value is told:
            sys.stderr.write(f"error: {told}\n")
        else:
            show(kind, value, trace)

    sys.excepthook = hook
    return told


def is_command() -> bool:
    """Whether this program is the command `atp`."""
    return bool(sys.argv and Path(sys.argv[0]).stem == "atp") or sys.orig_argv[1:3] == ["-m", "atp"]


def imports_are_done() -> None:
    """Restores Python's own handling of Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(signum: int, frame: FrameType | None) -> None:
    sentence, code = interrupted()
    os.write(2, f"error: {sentence}\n".encode())
    os._exit(code)
