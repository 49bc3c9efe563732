"""The targets of a sweep, and the runs that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atp.config import ATPConfig
from atp.ground.files import read_json
from atp.inputs.folders import LATENCY
from atp.inputs.targets import at_share, at_target, share_of
from atp.plan.latency import LatencyTable, measured_target
from atp.studies.sweep.units import Asked


class SweepTarget(NamedTuple):
    """A target of a sweep, and the run that it asks for.

    given: the config with the target in its unit, as `atp train` would get it. config: with the share of the decoder
    that it comes to, and otherwise as open as that. latency: what was measured for a target in milliseconds, else None.
    """

    asked: Asked
    given: ATPConfig
    config: ATPConfig
    latency: dict[str, Any] | None


def targets_of(config: ATPConfig, asked: Sequence[Asked], folder: Path) -> list[SweepTarget]:
    """The targets, each with a run folder under `folder`; times of one kind come from one measurement.

    A run folder that has its measurement keeps it, so that a resumed sweep goes on with the shares it began with.
    Raises `InputError` for a target out of the model's reach.
    """
    tables: dict[str, LatencyTable] = {}
    targets = []
    for one in asked:
        placed = config.model_copy(update={"output_dir": str(folder / one.folder)})
        given = at_target(placed, one.unit.key, one.value)
        latency = read_json(folder / one.folder / LATENCY)
        if latency is None or not isinstance(latency.get("target_keep"), float):
            latency = measured_target(given, tables)
        share = share_of(given) if latency is None else latency["target_keep"]
        targets.append(SweepTarget(one, given, at_share(given, share), latency))
    return targets
