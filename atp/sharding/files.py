"""Sharded weights in a checkpoint: one file per process, each with its rows of every weight.

The files follow one another in rows, so that any number of processes reads its own rows from them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atp.ground.files import flush, new_folder
from atp.processes import processes

_FILE = re.compile(r"shard-(\d{5})-of-(\d{5})\.safetensors")


def stage(root: Path, tensors: dict[str, Tensor]) -> Path:
    """Writes this process's rows to a folder beside the checkpoints, for the main process to `collect`.

    Returns that folder when all have written.
    """
    folder = processes.on_main(lambda: new_folder(root, "shards"))
    path = folder / f"shard-{processes.rank():05d}-of-{processes.count():05d}.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    flush(path)
    processes.wait()
    return folder


def collect(staged: Path, folder: Path) -> list[str]:
    """Moves the staged files of all processes into a folder and returns their names."""
    names = [f"shard-{rank:05d}-of-{processes.count():05d}.safetensors" for rank in range(processes.count())]
    for name in names:
        os.replace(staged / name, folder / name)
    return names


class ShardFiles:
    """The files of all processes in a folder; empty where none were written."""

    def __init__(self, folder: Path, names: Iterable[str] = ()) -> None:
        """names: of files in the folder; those that hold no shards are left out."""
        self.paths = [folder / name for name in sorted(names) if _FILE.fullmatch(name)]

    def names(self) -> list[str]:
        """The weights that are held."""
        if not self.paths:
            return []
        with safe_open(self.paths[0], "pt") as content:
            return sorted(content.keys())

    def read(self, name: str, rows: slice) -> Tensor:
        """Rows of a weight, in one piece."""
        found: list[Tensor] = []
        start = 0
        for path in self.paths:
            with safe_open(path, "pt") as content:
                part = content.get_slice(name)
                count = part.get_shape()[0]
                last = count if rows.stop is None else min(rows.stop - start, count)
                first = max(rows.start - start, 0)
                if first < last or not found:
                    found.append(part[first : max(first, last)])
                start += count
        return torch.cat(found)
