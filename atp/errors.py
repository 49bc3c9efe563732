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
