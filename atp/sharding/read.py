"""Reads a model folder into shards: every process reads its own rows of each weight and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from atp.ground.files import sha256
from atp.models.cut import place_indices
from atp.models.load import read_config, require_whole, weight_files
from atp.models.sizes import check_against_files
from atp.processes import processes
from atp.sharding.shards import fill, shard


def read_sharded(
    path: str | Path, dtype: torch.dtype | str, device: torch.device, revision: str | None = None
) -> PreTrainedModel:
    """The causal LM of a model folder or a Hub name, sharded over the processes, in evaluation mode.

    dtype: of the weights; "auto" keeps that of config.json. No process holds more than its rows. Raises `InputError`
    for a model that is missing, incomplete or not in safetensors.
    """
    config = read_config(path, None, revision)
    files = processes.main_first(lambda: weight_files(path, config, revision))  # which downloads them
    _refuse_other_copies(files)
    check_against_files(config, sum(file.stat().st_size for file in files))
    wanted = dtype if isinstance(dtype, torch.dtype) else (config.dtype or torch.float32)
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(config, dtype=wanted)
    model: PreTrainedModel = made
    where = {name: file for file in files for name in _names(file)}
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    require_whole(path, {
        "missing_keys": shapes.keys() - where.keys(),
        # A tied head may be stored beside the embeddings.
        "unexpected_keys": where.keys() - shapes.keys() - {"lm_head.weight"},
        "mismatched_keys": [
            (name, there, shape) for name, shape in shapes.items()
            if name in where and (there := _shape(where[name], name)) != shape
        ],
    })  # fmt: skip
    shard(model, device)
    fill(model, lambda name, rows: _rows(where[name], name, rows).to(wanted))
    place_indices(model)
    try:
        model.generation_config = GenerationConfig.from_pretrained(path, revision=revision or "main")
    except OSError:
        pass  # a model need not have one
    return model.eval()


def _refuse_other_copies(files: list[Path]) -> None:
    """Raises `InputError` in all processes if a machine's files are not those of the main one.

    Of a mixture of copies all would gather the same. Each process reads some files of its machine, and those all.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here == processes.count():
        return
    mine = files[int(os.environ.get("LOCAL_RANK", "0")) :: here]
    processes.refuse_differences({file.name: sha256(file) for file in mine}, "reads", processes.SAME_FILES)


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as content:
        return list(content.keys())


def _shape(file: Path, name: str) -> list[int]:
    with safe_open(file, "pt") as content:
        return list(content.get_slice(name).get_shape())


def _rows(file: Path, name: str, rows: slice) -> Tensor:
    with safe_open(file, "pt") as content:
        return content.get_slice(name)[rows.start : rows.stop]
