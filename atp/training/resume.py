"""Whether a run folder may be gone on with: under the same config, from the same inputs, with an intact checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atp.config import ATPConfig
from atp.files import read_json
from atp.folders import CHECKPOINTS, INPUTS, saved_config
from atp.training.checkpoint import exist, newest, read_values, resume_point


def refuse_other_config(config: ATPConfig, folder: Path) -> None:
    """Raises `InputError` under another config than that of a run's folder, or where all its checkpoints are damaged.

    The config is that of config.yaml, or of the newest checkpoint where the file is missing or damaged.
    """
    for root in (folder / name for name in CHECKPOINTS):
        if exist(root) and newest(root) is None:
            resume_point(root, print)
    saved = saved_config(folder) or _newest_values(folder).get("config")
    if saved is not None:
        config.refuse_change_of(saved)


def inputs_of(folder: Path) -> dict[str, str] | None:
    """Fingerprints that a run was started with, None where neither inputs.json nor a checkpoint tells."""
    return read_json(folder / INPUTS) or _newest_values(folder).get("inputs")


def _newest_values(folder: Path) -> dict[str, Any]:
    found = (newest(folder / name) for name in CHECKPOINTS)
    return next((read_values(path) for path in found if path is not None), {})
