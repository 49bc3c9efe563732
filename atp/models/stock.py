"""A cut model as a class of transformers' own, which every tool can load: where all its layers have equal widths."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from atp.families import family_of
from atp.ground.files import write_json
from atp.models.config import ATPLlamaConfig


def stock_config(config: Any) -> PretrainedConfig | None:
    """The config of a class of transformers' own that computes what a cut model does; None where there is none.

    config: of any model. There is a class where layers differ in no width, heads are whole, blocks read and add to the
    whole hidden state, and `Family.stock_config` names it.
    """
    if not isinstance(config, ATPLlamaConfig) or not config.has_plain_layers():
        return None
    return family_of(config).stock_config(config)


@torch.no_grad()
def as_stock(model: PreTrainedModel) -> PreTrainedModel:
    """The model in the class that `stock_config` finds, else the model itself. Weights are shared with `model`."""
    config = stock_config(model.config)
    if config is None:
        return model
    config._attn_implementation = model.config._attn_implementation
    config.dtype = model.dtype
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    stock.load_state_dict(model.state_dict(), assign=True)
    if config.tie_word_embeddings:
        stock.tie_weights()
    stock.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # which no state dict holds
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.train(model.training)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes config.json and the weights as safetensors, in a class of transformers' own where there is one.

    `rope_theta` and `rope_scaling` stand beside transformers' `rope_parameters` in config.json, because the converters
    of llama.cpp and mlx-lm look there.
    """
    as_stock(model).save_pretrained(folder, safe_serialization=True)
    rope_for_converters(folder)


def rope_for_converters(folder: Path) -> None:
    """Repeats the RoPE settings of a config.json at its top level."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    write_json(folder / "config.json", config)
