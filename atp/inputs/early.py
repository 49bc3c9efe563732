"""What a command refuses before it imports torch, which takes seconds: wrong keys, and paths where nothing is."""

from __future__ import annotations

from pathlib import Path

from atp.config import ATPConfig
from atp.data.files import check_source
from atp.ground import ranks
from atp.ground.places import refuse_no_model
from atp.inputs.folders import CONFIG, begun_by_this_launch, check_output_dir


def load_config(path: Path, overrides: list[str] | None, *, resume: bool | None = None) -> ATPConfig:
    """The settings of a command, once model, data and run folder are known to be usable names. Raises `InputError`.

    resume: of a command that writes to output_dir; None if it writes nothing, or elsewhere.
    """
    config = ATPConfig.load(path, overrides)
    refuse_places(config)
    if resume is not None:
        check_folder(Path(config.output_dir), resume, CONFIG)
    return config


def refuse_places(config: ATPConfig) -> None:
    """Raises `InputError` for a model or data that a config names by a path where nothing is."""
    refuse_no_model(config.model.path, config.model.gguf_file)
    if config.data.recipe == "custom":
        for _, source in config.data.own_sources:
            check_source(source)


def refuse_suite(suite: str) -> None:
    """Raises `InputError` for a suite that is a path where nothing is, or a config that is none."""
    if suite.endswith((".yaml", ".yml")):
        ATPConfig.load(suite)
    else:
        check_source(suite)


def check_folder(folder: Path, resume: bool, started: str) -> None:
    """Raises `InputError` for an output folder that cannot be used. Where processes share it, one of them asks later.

    started: as in `check_output_dir`.
    """
    if ranks.count() == 1:
        check_output_dir(folder, resume=resume or begun_by_this_launch(folder, started), started=started)
