"""Errors that a user can act on: the command line prints them as one sentence, without a traceback."""

from __future__ import annotations

import errno
import math
import re
import reprlib
from datetime import date
from pathlib import PurePath

PROCESS_ENDED = (
    "another process of this run has ended: read its own message (none if it was killed, as for memory), then continue "
    "with --resume"
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SENTENCE = 1000  # characters of a whole message, whatever it quotes
# C0 but tab and newline, DEL and C1, which a terminal obeys; what turns the order of text around; half surrogate pairs.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """Bad input: what is wrong, where, and the remedy, in one sentence. Exit code 2."""

    def __init__(self, message: object) -> None:
        super().__init__(shorten(message, _SENTENCE))


class NotReached(RuntimeError):
    """The run ended without keeping a promise (budget, certificate, finite losses). Exit code 3."""


class JobsFailed(RuntimeError):
    """Runs on other processes or machines ended without a result; the others are done. Exit code 1."""


class Interrupted(BaseException):
    """A signal stopped the run, which can be resumed. Exit code 128 + signal number.

    Like KeyboardInterrupt it is no Exception, so that no library catches it as a failure of its own.
    """

    def __init__(self, signum: int, remedy: str = "") -> None:
        super().__init__(f"interrupted by signal {int(signum)}: {remedy or 'repeat the command'}")
        self.signum, self.remedy = signum, remedy


def shorten(text: object, limit: int = 200) -> str:
    """Text for use in a message: at most `limit` printable characters on one line.

    Text, paths and exceptions are shown as they are, anything else as by `quote`. Never raises.
    """
    if not isinstance(text, (str, PurePath, Exception)):
        return quote(text, limit)
    try:
        text = str(text)
    except Exception:  # a foreign __str__ may do anything
        text = type(text).__name__
    # Twice the limit is enough to know that more follows, without processing a long text.
    return _cut(_printable(" ".join(text[: 2 * limit + 2].split())), limit, more=len(text) > 2 * limit + 2)


def quote(value: object, limit: int = 200) -> str:
    """A value as Python writes it, in at most `limit` printable characters on one line.

    Takes bounded time for values that are huge, deep, self-referencing or unprintable. Never raises.
    """
    try:
        return _cut(_printable(_Short(limit).repr(value)), limit)
    except Exception:  # a __repr__ may do anything
        return _cut(_name(value), limit)


def visible(text: str) -> str:
    """Foreign text for a terminal or a page: what those would obey is shown, ESC as `\\x1b`; lines stay lines."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def reason(error: BaseException) -> str:
    """Why something failed, on one short line: the first line of the message, with the type if that adds anything."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and isinstance(error, (OSError, ValueError)) and not isinstance(error, UnicodeError):
        return shorten(lines[0])
    return shorten(": ".join([type(error).__name__, *lines[:1]]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python, CUDA and torch's CPU allocator each report it differently."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "out of memory", "can't allocate memory")
    )


def errno_of(error: BaseException) -> int | None:
    """The errno of an error, including those that libraries written in Rust report as text."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk, or this user's share of it, is full."""
    return errno_of(error) in _FULL


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exchange with another process failed, as it does when that one has ended, or this says so already.

    gloo raises a RuntimeError like its others, torch and NCCL errors of classes of their own.
    """
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    if str(error) == PROCESS_ENDED:
        return True
    signs = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out", "pair closure")
    text = str(error)
    return isinstance(error, RuntimeError) and "gloo" in text.lower() and any(sign in text for sign in signs)


class _Short(reprlib.Repr):
    """`repr` within `limit` characters: strings keep their beginning, containers a few items."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.maxlevel = limit, 4
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = self.maxother = 12

    def repr_str(self, text: str, level: int) -> str:
        return repr(text[: self.limit]) + ("..." if len(text) > self.limit else "")

    def repr_bytes(self, content: bytes, level: int) -> str:
        return repr(content[: self.limit]) + ("..." if len(content) > self.limit else "")

    def repr_int(self, number: int, level: int) -> str:
        digits = number.bit_length() * math.log10(2)
        return repr(number) if digits < self.limit else f"a number of about {math.ceil(digits)} digits"

    def repr_instance(self, value: object, level: int) -> str:
        # Another __repr__ may be endless; these are short.
        return repr(value) if isinstance(value, (bool, float, date, PurePath, type(None))) else _name(value)


def _name(value: object) -> str:
    return f"a {type(value).__name__}"


def _printable(text: str) -> str:
    """The text with control characters, and those that cannot be encoded, escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _cut(text: str, limit: int, *, more: bool = False) -> str:
    return text if len(text) <= limit and not more else f"{text[: limit - 3]}..."
