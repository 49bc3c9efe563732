"""From a config to the objects of a run: model, tokenizer, splits and packed windows; every check before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from atp.config import ATPConfig, ModelConfig
from atp.data import DataSettings, PackedDataset, RaggedDataset, Splits, chat_of, load_recipe, pack, unpacked
from atp.data.packages import PACKAGED_MODEL, smollm2_gguf
from atp.errors import InputError
from atp.masks.space import MaskSpace, SpaceName


@dataclass(frozen=True)
class RunData:
    """Examples of the three splits, and the samples that training, decisions and perplexity read."""

    splits: Splits
    train: PackedDataset | RaggedDataset
    calibration: PackedDataset | RaggedDataset
    test: PackedDataset


def check_output_dir(folder: Path, *, resume: bool) -> None:
    """Refuses to write into a folder that holds anything, or to resume from one that holds nothing."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file: choose another output_dir")
    filled = folder.is_dir() and any(folder.iterdir())
    if filled and not resume:
        raise InputError(f"output_dir {folder} is not empty: choose another output_dir, or continue it with --resume")
    if resume and not filled:
        raise InputError(f"nothing to resume in {folder}: start the run without --resume")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `InputError` when there is none."""
    source = _source(config)
    try:
        return AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError) as error:
        raise InputError(_not_found("tokenizer", config, error)) from None


def load_model(config: ModelConfig, space: SpaceName) -> nn.Module:
    """The causal LM to prune in the dtype of the config, after its family was checked against the mask space."""
    try:
        MaskSpace.from_config(AutoConfig.from_pretrained(**_source(config)), space)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(_not_found("model", config, error)) from None
    return load_any_model(config)


def check_length(model: nn.Module, length: int) -> None:
    """Refuses windows longer than the positions that the model was trained for."""
    limit = model.config.max_position_embeddings
    if length > limit:
        raise InputError(f"data.length is {length} and the model reaches {limit} positions: lower data.length")


def load_any_model(config: ModelConfig) -> nn.Module:
    """A causal LM of any family, in the dtype of the config. Raises `InputError` when there is none."""
    source = _source(config)
    try:
        if "gguf_file" in source:
            # Without dequantize the model counts as quantized and can be neither trained nor saved.
            source["quantization_config"] = GgufConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(dtype=getattr(torch, config.dtype), **source)
    except (OSError, ValueError) as error:
        raise InputError(_not_found("model", config, error)) from None


def data_settings(config: ATPConfig, tokenizer: PreTrainedTokenizerBase) -> DataSettings:
    """What the recipe of a run takes."""
    values = config.data.model_dump(exclude={"length", "loss_on", "packing"})
    seed = config.seed if config.data.seed is None else config.data.seed
    return DataSettings(**values | {"seed": seed, "chat": chat_of(tokenizer)})


def load_data(config: ATPConfig, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Splits by recipe, packed to windows. Raises `InputError` for whatever is wrong with the data."""
    data = config.data
    splits = load_recipe(data_settings(config, tokenizer))
    train, calibration = (
        unpacked(part, tokenizer, data.length, loss_on=data.loss_on)
        if data.packing == "padded"
        else pack(part, tokenizer, data.length, loss_on=data.loss_on, separate=data.packing == "separate")
        for part in (splits.train, splits.calibration)
    )
    needed = config.training.batch_size * config.training.gradient_accumulation
    if len(train) < needed:
        raise InputError(
            f"the training split has {len(train)} windows of {data.length} tokens and one step takes "
            f"{needed}: give more text, or lower data.length or training.batch_size"
        )
    # Perplexity is over joined windows whatever training reads, so that runs compare.
    return RunData(splits, train, calibration, pack(splits.test, tokenizer, data.length, loss_on=data.loss_on))


def _source(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say where the model is. Raises `InputError` for a package that is missing."""
    if config.path == PACKAGED_MODEL:
        gguf = smollm2_gguf()
        return {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    gguf_file = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    return {"pretrained_model_name_or_path": config.path} | gguf_file


def _not_found(what: str, config: ModelConfig, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    remedy = f"give a model folder, a Hub name or {PACKAGED_MODEL}"
    return f"cannot load the {what} from model.path '{config.path}': {remedy} ({reason})"
