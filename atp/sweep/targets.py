"""What a sweep goes over: targets in any unit that the config knows, as they are written on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from atp.config import ATPConfig
from atp.errors import InputError, shorten
from atp.latency import Table, with_time
from atp.targets import at_target, with_share

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


class Target(NamedTuple):
    """A target of a sweep, and the run that it asks for.

    given: the config with the target in its unit, as `atp train` would get it. config: with the share of the decoder
    that it comes to. latency: what was measured for a target in milliseconds, else None.
    """

    asked: Asked
    given: ATPConfig
    config: ATPConfig
    latency: dict[str, Any] | None


def resolve(config: ATPConfig, asked: Sequence[Asked], folder: Path) -> list[Target]:
    """The targets, each with a run folder under `folder`; times of one kind come from one measurement.

    Raises `InputError` for a target out of the model's reach.
    """
    tables: dict[str, Table] = {}
    targets = []
    for one in asked:
        placed = config.model_copy(update={"output_dir": str(folder / one.folder)})
        given = at_target(placed, one.unit.key, one.value)
        timed, latency = with_time(given, tables)
        targets.append(Target(one, given, with_share(timed), latency))
    return targets
