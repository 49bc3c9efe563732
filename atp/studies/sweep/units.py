"""The units of targets and how they are written on the command line, without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from atp.ground.errors import InputError, shorten

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Unit:
    """A unit of targets.

    key: of `decisions`. option: of the command, without dashes, and the beginning of folder names. what: one value in
    words. example: two of them. whole: whether values are whole numbers, which may end in k, M or B. below: what they
    are less than.
    """

    key: str
    option: str
    what: str
    example: str
    whole: bool = False
    below: float = float("inf")

    def parse(self, text: str) -> list[Asked]:
        """The targets in a comma-separated list, as they were given. Raises `InputError` naming what is none."""
        return [Asked(self, self._number(part)) for part in map(str.strip, text.split(",")) if part]

    def _number(self, text: str) -> float:
        found = re.fullmatch(r"([0-9.]+(?:e-?[0-9]+)?)([kMB]?)", text)
        try:
            value = float(found[1]) * _SUFFIXES[found[2]] if found and (self.whole or not found[2]) else 0.0
        except ValueError:
            value = 0.0
        if not 0 < value < self.below or (self.whole and round(value) < 1):
            raise InputError(
                f"--{self.option} '{shorten(text)}' is no {self.what}: use for example --{self.option} {self.example}"
            )
        return round(value) if self.whole else value


UNITS = (
    Unit("target_keep", "keep", "share of the decoder between 0 and 1", "0.8,0.6", below=1),
    Unit("target_params", "params", "number of parameters", "110M,90M", whole=True),
    Unit("target_megabytes", "megabytes", "size in megabytes", "450,400"),
    Unit("target_prefill_ms", "prefill-ms", "time in milliseconds", "300,250"),
    Unit("target_decode_ms", "decode-ms", "time in milliseconds", "60,50"),
)


class Asked(NamedTuple):
    """A target as it was asked for: 0.8 of the decoder, or 90,000,000 parameters."""

    unit: Unit
    value: float

    @property
    def text(self) -> str:
        """Option and value, as in `keep 0.8`."""
        return f"{self.unit.option} {self._value}"

    @property
    def folder(self) -> str:
        """Name of the run folder."""
        return f"{self.unit.option}-{self._value}"

    @property
    def _value(self) -> str:
        return str(self.value) if self.unit.whole else f"{self.value:g}"


def refuse_targets(asked: Sequence[Asked]) -> None:
    """Raises `InputError` without any target, or for one that is given twice."""
    if not asked:
        raise InputError("nothing to sweep over: give at least one target, as --keep 0.8,0.6")
    places = [one.folder for one in asked]
    twice = [one for one in asked if places.count(one.folder) > 1]
    if twice:
        option, _, value = twice[0].text.partition(" ")
        raise InputError(f"--{option} names {value} twice: give each target once")
