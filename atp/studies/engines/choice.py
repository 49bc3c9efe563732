"""The engine that the command line asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from atp.ground.errors import InputError, quote, shorten
from atp.ground.requirements import require
from atp.studies.engines.engine import Engine, Here, Say

ENGINES = ("here", "local", "slurm", "ray")


def choose(name: str, resources: Sequence[str], at_once: int | None, logs: Path, say: Say) -> Engine:
    """The engine called `name`.

    resources: "key=value" each, of one job. at_once: jobs at a time, None for as many as the engine takes. logs: folder
    for what an engine writes about its jobs; made when the first one starts. Raises `InputError`.
    """
    if name not in ENGINES:
        raise InputError(f"--on '{shorten(name)}' is unknown: use {', '.join(ENGINES)}")
    wanted = dict(map(_resource, resources))
    if name == "here":
        if wanted or at_once is not None:
            raise InputError("--resource and --at-once are for --on local, slurm or ray: here one run follows another")
        return Here(say)
    if name == "ray":
        require("ray")
        from atp.studies.engines.on_ray import Ray

        return Ray(wanted, at_once, say)
    require("submitit")
    from atp.studies.engines.on_submitit import Submitit

    return Submitit(name, wanted, at_once, logs, say)


def _resource(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found or not key.isidentifier():
        raise InputError(f"--resource {quote(text)} is not key=value: use for example --resource timeout_min=600")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value
