"""Output folders: which may be used or resumed, and the lock that admits one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atp.config import ATPConfig
from atp.ground import ranks
from atp.ground.errors import InputError, shorten
from atp.ground.files import check_writable, remove_leftovers, write_text
from atp.ground.locking import LOCK, locked
from atp.ground.reading import existing, read_yaml

CONFIG, RESOLVED, COMPARISON = "config.yaml", "resolved.yaml", "comparison.yaml"
INPUTS, LATENCY, LENGTH = "inputs.json", "latency.json", "length.json"
VOCABULARY = "vocabulary.safetensors"
LAUNCH = ".launch"  # which launch of torchrun was here last
SKIPPED = "skipped_rows.txt"
CHECKPOINTS = ("checkpoints", "dense_lora/checkpoints")
_BEFORE = {
    LOCK,
    LAUNCH,
    INPUTS,
    LATENCY,
    LENGTH,
    RESOLVED,
    VOCABULARY,
}  # what may lie in the folder of a run that has not begun
_WRITTEN_TO = ("", "model", "base", "adapter", "dense_lora", "profile", *CHECKPOINTS)


def check_output_dir(folder: Path, *, resume: bool, started: str = CONFIG) -> None:
    """Raises `InputError` for a folder that is not empty, or on resume for one that holds no run.

    started: the file in which a run or comparison keeps its config.
    """
    if os.path.isfile(folder):  # pathlib raises where a name is too long
        raise InputError(f"output_dir {folder} is a file: choose another output_dir")
    check_writable(folder, "output_dir")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    filled = {name for name in names - _BEFORE if not name.startswith(".writing-")}
    if filled and not resume:
        raise InputError(f"output_dir {folder} is not empty: choose another output_dir, or continue it with --resume")
    if resume and not filled:
        raise InputError(f"nothing to resume in {folder}: start the run without --resume")
    checkpoints = [path for name in CHECKPOINTS for path in (folder / name).glob("checkpoint-*")]
    if resume and not checkpoints and saved_config(folder, started) is None:
        raise InputError(
            f"nothing to resume in {folder}: it has no readable {started} and no checkpoints, so it is not the folder "
            "of a run: choose another output_dir"
        )


def saved_config(folder: Path, started: str = CONFIG) -> dict[str, Any] | None:
    """A config of a folder; None if the file is missing, damaged or not a config of ours.

    started: CONFIG is what a run was asked to do, RESOLVED what it computes with.
    """
    try:
        values = read_yaml((folder / started).read_bytes(), started)
        ATPConfig.parse(values)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return values


def begun_by_this_launch(folder: Path, started: str = CONFIG) -> bool:
    """Whether torchrun has started this run before, so that it goes on where a killed process has left it."""
    launch = ranks.run_id()
    try:
        return launch is not None and (folder / LAUNCH).read_text(encoding="utf-8") == launch and (
            folder / started).is_file()  # fmt: skip
    except (OSError, ValueError):
        return False


def refuse_inputs_inside(config: ATPConfig, folder: Path) -> None:
    """Raises `InputError` if a model or data file of the config lies where a run in `folder` writes.

    Follows links on both sides. Names that are not local paths (Hub names, packages) are ignored.
    """
    named = [("model.path", config.model.path), *config.data.own_sources]
    named += [("decisions.path", config.decisions.path)] if config.decisions.path else []
    named += [(f"data.sources.{name}", source) for name, source in config.data.sources.items()]
    places = {(folder / name).resolve() for name in _WRITTEN_TO}
    for key, value in named:
        path = existing(value)
        if path is None:
            continue
        path = path.resolve()
        if any(path == place or place in path.parents for place in places):
            raise InputError(
                f"{key} {shorten(value)} lies in {folder}, which the run writes to and would overwrite: choose another "
                "output_dir"
            )


@contextmanager
def opened(folder: Path, *, resume: bool, started: str = CONFIG) -> Iterator[None]:
    """Creates a folder if needed, locks it and removes leftovers of a crash; a failed start leaves no folder behind.

    Raises `InputError` if another process is using it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create folder {folder} ({error.strerror}): choose another output_dir") from None
    with locked(folder):
        check_output_dir(folder, resume=resume, started=started)  # another process may have been here by now
        remove_leftovers(folder)
        if (launch := ranks.run_id()) is not None and not begun_by_this_launch(folder, started):
            write_text(folder / LAUNCH, launch)
        try:
            yield
        except Exception:
            if not resume:
                _withdraw(folder, made, {*_BEFORE, started})
            raise


def _withdraw(folder: Path, made: Iterable[Path], start: set[str]) -> None:
    """Removes a folder that holds only what a start writes, which would otherwise block the next start."""
    if {path.name for path in folder.iterdir()} <= start:
        for name in start:
            (folder / name).unlink(missing_ok=True)
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()
