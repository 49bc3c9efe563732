"""The arms of a comparison, known without torch, so that a wrong method is refused at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from atp.baselines import BASELINE_NAMES
from atp.ground.errors import InputError, shorten
from atp.ground.places import refuse_no_model

ATP = "atp"
METHODS = (ATP, *BASELINE_NAMES)
RIVAL = "model:"
"""What a method begins with that is another pretrained model, tuned whole; `model.path` of a config follows."""


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison: a method, and its changes to the common config ("key.path=value" each).

    Raises `InputError` for an unknown method, and for a rival that names no model.
    """

    method: str
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rival is not None:
            if not self.rival.strip():
                raise InputError(f"method '{RIVAL}' names no model: give {RIVAL}PATH")
            refuse_no_model(self.rival)
        elif self.method not in METHODS:
            name = shorten(self.method)
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
            raise InputError(f"method '{name}' is unknown: did you mean '{near}'? ({', '.join(METHODS)})")

    @property
    def rival(self) -> str | None:
        """The pretrained model that is tuned in place of the config's; None for a method."""
        return self.method.removeprefix(RIVAL) if self.method.startswith(RIVAL) else None

    @property
    def name(self) -> str:
        """The method and its changes, comma-separated."""
        return ",".join((self.method, *self.overrides))


def compared(methods: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
    """The arms of these methods, each once, rivals last: they train as long as ATP did.

    Raises `InputError` for an unknown method, or without any method or seed.
    """
    if not methods or not seeds:
        raise InputError("nothing to compare: give at least one method and one seed")
    return sorted(map(Arm, dict.fromkeys(methods)), key=lambda arm: arm.rival is not None)
