"""Suggestions for config keys that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from atp.ground.errors import shorten

# Our keys, and their names in other programs.
_NAMES = {
    "r": "rank lora_r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "variant": "use_rslora use_dora rslora dora",
    "lr": "learning_rate",
    "batch_size": "batch bs train_batch_size per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps accumulation grad_acc",
    "schedule": "scheduler lr_scheduler lr_scheduler_type",
    "warmup": "warmup_steps",
    "clip": "max_grad_norm grad_clip gradient_clip",
    "precision": "bf16 fp16 mixed_precision",
    "save_every": "save_steps",
    "log_every": "logging_steps",
    "keep_checkpoints": "save_total_limit",
    "report_to": "tracker logger",
    "length": "max_length max_seq_length seq_length sequence_length block_size context_length",
    "train": "dataset dataset_name train_file file",
    "test": "validation eval",
    "limit": "max_samples",
    "labels": "classes",
    "columns": "column_mapping field_mapping",
    "loss_on": "train_on_inputs assistant_only_loss completion_only_loss roles_to_train",
    "target_keep": "sparsity ratio keep keep_ratio pruning_ratio",
    "path": "name name_or_path model_name_or_path",
    "dtype": "torch_dtype",
    "output_dir": "out output",
    "seed": "random_seed",
}
_ELSEWHERE = {other: name for name, others in _NAMES.items() for other in others.split()}
_LENGTHS = ("epochs", "num_train_epochs", "num_epochs", "max_steps", "steps", "num_steps", "iterations")


def unknown_key(path: list[str], root: type[BaseModel]) -> str:
    """The sentence for an unknown key (its path below `root`), with the likeliest real one.

    Tried in order: another program's name for the setting, the nearest spelling, the same name in another section.
    """
    section = _section(path[:-1], root)
    known, written = section.model_fields, path[-1].lower()
    elsewhere = [name for name in _places(root) if name.rpartition(".")[2] in (written, _ELSEWHERE.get(written))]
    near = difflib.get_close_matches(shorten(written), known, n=1, cutoff=0.6)
    if written in _LENGTHS:
        hint = "training.steps sets the length of a run, in steps"
    elif _ELSEWHERE.get(written) in known:
        hint = f"did you mean '{_ELSEWHERE[written]}'?"
    elif near:
        hint = f"did you mean '{near[0]}'?"
    elif elsewhere:
        hint = f"did you mean {' or '.join(map(repr, elsewhere[:2]))}?"
    else:
        hint = f"the known keys are {shorten(', '.join(known), 400)}"
    return f"unknown config key '{shorten('.'.join(path))}': {hint}"


def _section(path: list[str], root: type[BaseModel]) -> Any:
    """The schema at a path; all items of a list have the same schema, so its indices lead no further down."""
    for part in path:
        annotation = root if part.isdecimal() else root.model_fields[part].annotation
        root = (*get_args(annotation), annotation)[0]
    return root


def _places(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of a schema."""
    for name, field in root.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _places(field.annotation, f"{prefix}{name}.")
