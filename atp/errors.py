"""Errors that a user can act on: the command line prints them as one sentence, without a traceback."""

from __future__ import annotations

import math
import reprlib
from datetime import date
from pathlib import PurePath

_SENTENCE = 1000  # characters of a whole message, whatever it quotes


class InputError(ValueError):
    """Bad input: what is wrong, where, and the remedy, in one sentence. Exit code 2."""

    def __init__(self, message: object) -> None:
        super().__init__(shorten(message, _SENTENCE))


class NotReached(RuntimeError):
    """The run ended without keeping a promise (budget, certificate, finite losses). Exit code 3."""


class Interrupted(BaseException):
    """A signal stopped the run, which can go on from what it wrote. Exit code 128 + signal number.

    Like KeyboardInterrupt it is no Exception: no library on the way may take it for a failure of its own.
    """

    def __init__(self, signum: int, remedy: str = "") -> None:
        super().__init__(f"interrupted by signal {int(signum)}: {remedy or 'repeat the command'}")
        self.signum, self.remedy = signum, remedy


def shorten(text: object, limit: int = 200) -> str:
    """Whatever a message quotes, in at most `limit` printable characters on one line.

    A text, a path and an exception say what they say, anything else is shown as `quote` shows it. Never raises.
    """
    if not isinstance(text, (str, PurePath, Exception)):
        return quote(text, limit)
    try:
        text = str(text)
    except Exception:  # an exception of somebody else's, which may do anything
        text = type(text).__name__
    # Twice the limit is enough to know that more follows; a long text is not worked through.
    return _cut(_printable(" ".join(text[: 2 * limit + 2].split())), limit, more=len(text) > 2 * limit + 2)


def quote(value: object, limit: int = 200) -> str:
    """A value as Python writes it, in at most `limit` printable characters on one line.

    Takes no longer for values that are huge, deep, refer to themselves or cannot be shown. Never raises.
    """
    try:
        return _cut(_printable(_Short(limit).repr(value)), limit)
    except Exception:  # a __repr__ may do anything
        return _cut(_name(value), limit)


def reason(error: BaseException) -> str:
    """Why something failed, on one short line: the first line of the message, with the type where that says more."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and isinstance(error, (OSError, ValueError)) and not isinstance(error, UnicodeError):
        return shorten(lines[0])
    return shorten(": ".join([type(error).__name__, *lines[:1]]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device: Python, a GPU and torch's CPU allocator each say so differently."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "out of memory", "can't allocate memory")
    )


class _Short(reprlib.Repr):
    """`repr` of what fits into `limit` characters: strings keep their beginning, containers a few items."""

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
    """The text with whatever a terminal would obey, or could not encode, written as an escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _cut(text: str, limit: int, *, more: bool = False) -> str:
    return text if len(text) <= limit and not more else f"{text[: limit - 3]}..."
