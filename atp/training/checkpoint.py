"""Atomic checkpoints without pickle: one safetensors file, one JSON file, a pointer to the newest.

A checkpoint is written to a temporary folder, flushed, renamed, and only then named in LATEST, so that a crash at any
point leaves the last complete one usable.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState

from atp.errors import InputError, NotReached
from atp.files import flush, write_text
from atp.finite import first_non_finite

LATEST = "LATEST"
_TENSORS, _META, _TRAINER = "state.safetensors", "state.json", "trainer_state.json"
_PREFIX = "checkpoint-"


@dataclass
class Checkpoint:
    """Everything needed to go on: named tensors, JSON-able values, and the Trainer's own state as JSON text."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    trainer_state: str

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix.`, without it."""
        start = prefix + "."
        return {name[len(start) :]: value for name, value in self.tensors.items() if name.startswith(start)}


def save(root: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Writes root/checkpoint-<step> atomically, updates LATEST and removes all but the newest `keep`.

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
    temporary = root / f".writing-{checkpoint.step:08d}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    # safetensors refuses shared or strided storage; clones are small (adapter, moments, generator).
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in checkpoint.tensors.items()}, temporary / _TENSORS)
    (temporary / _TRAINER).write_text(checkpoint.trainer_state, encoding="utf-8")
    digests = {name: _digest(temporary / name) for name in (_TENSORS, _TRAINER)}
    meta = {"step": checkpoint.step, "sha256": digests, "values": checkpoint.meta}
    (temporary / _META).write_text(json.dumps(meta), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        flush(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    write_text(root / LATEST, final.name + "\n")
    _prune(root, final, keep)
    return final


def load(folder: Path) -> Checkpoint:
    """Reads a complete checkpoint. Raises `InputError` when it is torn."""
    problem = _problem(folder)
    if problem:
        raise InputError(f"checkpoint {folder} is damaged ({problem}): resume from an older one or start again")
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    trainer_state = (folder / _TRAINER).read_text(encoding="utf-8")
    return Checkpoint(meta["step"], load_file(folder / _TENSORS), meta["values"], trainer_state)


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint under root: the one LATEST names, else the last one that is intact."""
    if not root.is_dir():
        return None
    folders = sorted((p for p in root.glob(f"{_PREFIX}*") if p.is_dir()), reverse=True)
    pointer = root / LATEST
    if pointer.is_file():
        named = root / pointer.read_text(encoding="utf-8").strip()
        folders = sorted(folders, key=lambda p: p != named)
    return next((folder for folder in folders if _problem(folder) is None), None)


def trainer_state_json(state: TrainerState) -> str:
    """Trainer's own state without its log, as JSON text."""
    values = {k: v for k, v in asdict(state).items() if k not in ("log_history", "stateful_callbacks")}
    return json.dumps(values | {"log_history": [], "stateful_callbacks": {}})


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(folder: Path) -> str | None:
    for name in (_TENSORS, _META, _TRAINER):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return f"{_META} is not JSON"
    if not isinstance(meta.get("sha256"), dict):
        return f"{_META} has no checksums"
    torn = [name for name in (_TENSORS, _TRAINER) if meta["sha256"].get(name) != _digest(folder / name)]
    return f"{torn[0]} does not match its checksum" if torn else None


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Removes what a crash left half-written and all but `keep` checkpoints, never the one just written."""
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    folders = sorted((p for p in root.glob(f"{_PREFIX}*") if p.is_dir()), key=lambda p: (p == newest, p.name))
    for folder in folders[:-keep]:
        shutil.rmtree(folder)
