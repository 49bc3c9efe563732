"""Errors that a user can act on: the command line prints them as one sentence, without a traceback."""


class InputError(ValueError):
    """Bad input: what is wrong, where, and the remedy, in one sentence. Exit code 2."""


class NotReached(RuntimeError):
    """The run ended without keeping a promise (budget, certificate, finite losses). Exit code 3."""


class Interrupted(RuntimeError):
    """A signal stopped the run after a checkpoint was written. Exit code 128 + signal number."""

    def __init__(self, signum: int, checkpoint: str) -> None:
        super().__init__(f"interrupted by signal {signum}: continue with --resume (checkpoint {checkpoint})")
        self.signum = signum


def shorten(text: object, limit: int = 200) -> str:
    """Whatever a message quotes, in at most `limit` characters on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


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
