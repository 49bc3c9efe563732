"""Atomic checkpoints without pickle: one safetensors file, one JSON file, a pointer to the newest.

A checkpoint is written to a temporary folder, flushed, renamed, and only then named in LATEST, so that a crash at any
point leaves the last complete one usable. A file that does not match its checksum is not read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atp.ground.errors import InputError, NotReached, shorten
from atp.ground.files import remove_leftovers, sha256, whole_folder, write_text
from atp.processes.finite import first_non_finite
from atp.sharding.files import ShardFiles, collect

LATEST = "LATEST"
FORMAT = 7  # goes up with every change after which an older checkpoint cannot be continued
_TENSORS, _META = "state.safetensors", "state.json"
_PREFIX = "checkpoint-"


@dataclass
class Checkpoint:
    """Everything needed to continue after `step` LoRA steps: named tensors and JSON-able values."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    shards: dict[str, Tensor] = field(default_factory=dict)
    """Rows of sharded weights that this process holds, to be written; read back from `files`."""
    files: ShardFiles = field(default_factory=lambda: ShardFiles(Path()))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix.`, without it."""
        start = prefix + "."
        return {name[len(start) :]: value for name, value in self.tensors.items() if name.startswith(start)}

    def replace(self, prefix: str, tensors: dict[str, Tensor]) -> None:
        """Puts these tensors in place of all under `prefix.`."""
        others = {name: value for name, value in self.tensors.items() if not name.startswith(prefix + ".")}
        self.tensors = others | prefixed(prefix, tensors)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Rows of a weight, whether it was written in shards or in one piece."""
        return self.tensors[name][rows] if name in self.tensors else self.files.read(name, rows)


def save(root: Path, checkpoint: Checkpoint, *, keep: int, staged: Path | None = None) -> Path:
    """Writes root/checkpoint-<step> atomically, updates LATEST and removes all but the newest `keep`.

    staged: where all processes have written their shards by then (`atp.sharding.files.stage`).
    Raises `NotReached` for a tensor that holds NaN or infinity, before anything is written.
    """
    spoiled = first_non_finite(checkpoint.tensors.items())
    if spoiled is not None:
        raise NotReached(
            f"at step {checkpoint.step} {spoiled} holds NaN or infinity, so no checkpoint was written: start again "
            "with a lower learning rate or training.precision=float32; the last checkpoint is good"
        )
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{_PREFIX}{checkpoint.step:08d}"
    # safetensors refuses shared or strided storage, which the parts of a flat tensor have.
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in checkpoint.tensors.items()}
    with whole_folder(final) as folder:
        save_file(tensors, folder / _TENSORS)
        names = [_TENSORS, *(collect(staged, folder) if staged else [])]
        facts = {"format": FORMAT, "step": checkpoint.step, "sha256": {name: sha256(folder / name) for name in names}}
        meta = json.loads(json.dumps(facts | {"values": checkpoint.meta}))
        (folder / _META).write_text(json.dumps(meta | {"checksum": _checksum(meta)}), encoding="utf-8")
    write_text(root / LATEST, final.name + "\n")
    _prune(root, checkpoint.step, keep)
    return final


def load(folder: Path) -> Checkpoint:
    """Reads a complete checkpoint. Raises `InputError` when it is damaged or of another version of ATP."""
    problem = _problem(folder)
    if problem:
        raise InputError(f"checkpoint {folder} is damaged ({problem}): resume from an older one or start again")
    refuse_other_format(folder)
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    return Checkpoint(
        meta["step"], load_file(folder / _TENSORS), read_values(folder), files=ShardFiles(folder, meta["sha256"])
    )


def refuse_other_format(folder: Path) -> None:
    """Raises `InputError` for an intact checkpoint that another version of ATP wrote in another format."""
    found = json.loads((folder / _META).read_text(encoding="utf-8")).get("format", 1)
    if found != FORMAT:
        raise InputError(
            f"checkpoint {folder} has format {found} and this version of ATP reads format {FORMAT}: finish the run "
            "with the version that started it, or start again in another output_dir"
        )


def read_values(folder: Path) -> dict[str, Any]:
    """The JSON-able values of an intact checkpoint."""
    values: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))["values"]
    if "precision" in values:  # older versions kept `auto` in the config, and beside it what that had come to
        values["config"]["training"]["precision"] = values.pop("precision")
    return values


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint under root: the one LATEST names, else the last one that is intact."""
    return next((folder for folder in _candidates(root) if _problem(folder) is None), None)


def exist(root: Path) -> bool:
    """Whether a run has written checkpoints under root, intact or not."""
    return (root / LATEST).exists() or bool(_candidates(root))


def resume_point(root: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to continue from, None where none was written yet; says which damaged ones it passes over.

    Raises `InputError` when there are checkpoints and none is intact, or the one to continue from has another format.
    """
    passed = []
    if (root / LATEST).exists() and _named(root) is None:
        passed.append(f"{LATEST} names no checkpoint")
    for folder in _candidates(root):
        problem = _problem(folder)
        if problem is None:
            refuse_other_format(folder)
            for reason in passed:
                say(f"damaged in {root}: {reason}; going on from {folder.name}")
            return folder
        passed.append(f"{folder.name}, {problem}")
    if passed:
        raise InputError(
            f"no checkpoint in {root} is intact ({shorten('; '.join(passed))}): start again in another output_dir"
        )
    return None


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under `prefix.name`; `Checkpoint.part` is the inverse."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Optimizer state as `<parameter name>.<state name>` -> tensor; names follow the optimizer's parameter order."""
    state = optimizer.state_dict()["state"]
    return {f"{names[index]}.{key}": value for index, values in state.items() for key, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; learning rates and other group options stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    index = {name: position for position, name in enumerate(names)}
    for key, value in tensors.items():
        name, _, field = key.rpartition(".")
        state.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is just as it was written."""
    for name in (_TENSORS, _META):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if meta.pop("checksum") != _checksum(meta):
            return f"{_META} does not match its checksum"
        files = {_TENSORS: meta["sha256"][_TENSORS], **meta["sha256"]}
        torn = next((name for name, digest in files.items() if digest != sha256(folder / name)), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{_META} is not what was written"
    if torn:
        return f"{torn} does not match its checksum"
    return None if folder.name == f"{_PREFIX}{meta['step']:08d}" else f"{_META} is of step {meta['step']}"


def _candidates(root: Path) -> list[Path]:
    """Checkpoint folders, the one that LATEST names first, then from the highest step down."""
    folders = sorted((p for p in root.glob(f"{_PREFIX}*") if p.is_dir()), reverse=True)
    named = _named(root)
    return sorted(folders, key=lambda folder: folder != named)


def _named(root: Path) -> Path | None:
    """The folder that LATEST names, if it is there."""
    try:
        named = (root / LATEST).read_text(encoding="utf-8").strip()
        folder = root / named
        return folder if named.startswith(_PREFIX) and folder.parent == root and folder.is_dir() else None
    except (OSError, ValueError):
        return None


def _prune(root: Path, step: int, keep: int) -> None:
    """Removes what a crash left half-written and all but the last `keep` checkpoints up to `step`.

    Those of later steps are of a run that went another way or damaged: this one has just come from before them.
    """
    remove_leftovers(root)
    last = f"{_PREFIX}{step:08d}"
    folders = sorted(p for p in root.glob(f"{_PREFIX}*") if p.is_dir())
    earlier = [folder for folder in folders if folder.name <= last]
    for folder in {*folders} - {*earlier[-keep:]}:
        shutil.rmtree(folder)
