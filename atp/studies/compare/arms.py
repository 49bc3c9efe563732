"""The arms of a comparison, known without torch, so that a wrong method is refused at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from atp.baselines import BASELINE_NAMES
from atp.ground.errors import InputError, shorten

ATP = "atp"
METHODS = (ATP, *BASELINE_NAMES)


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison: a method, and its changes to the common config ("key.path=value" each).

    Raises `InputError` for an unknown method.
    """

    method: str
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            name = shorten(self.method)
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
            raise InputError(f"method '{name}' is unknown: did you mean '{near}'? ({', '.join(METHODS)})")

    @property
    def name(self) -> str:
        """The method and its changes, comma-separated."""
        return ",".join((self.method, *self.overrides))


def compared(methods: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
    """The arms of these methods, each once. Raises `InputError` for an unknown one, or without any method or seed."""
    if not methods or not seeds:
        raise InputError("nothing to compare: give at least one method and one seed")
    return [Arm(method) for method in dict.fromkeys(methods)]
