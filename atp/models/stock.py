"""A cut model as a class of transformers' own, which every tool can load: where all its layers have equal widths."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from atp.families import FAMILIES, family_of
from atp.ground.files import write_json
from atp.models.config import CutConfig
from atp.models.cut import complete
from atp.models.fused import joined


def stock_config(config: Any) -> PretrainedConfig | None:
    """The config of a class of transformers' own that computes what a cut model does; None where there is none.

    config: of any model. There is a class where layers differ in no width, heads are whole, blocks read and add to the
    whole hidden state, and `Family.equal` names it. head_dim is set even where the class does not declare it: Granite
    and SmolLM3 read it all the same.
    """
    if not isinstance(config, CutConfig) or not config.has_plain_layers():
        return None
    family = family_of(config)
    name = family.name if family.equal is None else family.equal(config)
    if name is None:
        return None
    stock: Any = CONFIG_MAPPING[name]
    biases, window = family.biases(config), family.sliding_window(config)
    values = config.to_dict() | {
        "attention_bias": biases.qkv, "attention_out_bias": biases.o, "mlp_bias": biases.mlp, "residual_dropout": 0.0,
        "sliding_window": window, "use_sliding_window": window is not None,
    }  # fmt: skip
    wanted = {field.name for field in fields(stock)} | set(stock.attribute_map.values())
    wanted -= {"model_type", "architectures", "transformers_version"}
    made: PretrainedConfig = stock(
        **{key: value for key, value in values.items() if key in wanted} | {"head_dim": config.head_dim}
    )
    return made


@torch.no_grad()
def as_stock(model: PreTrainedModel) -> PreTrainedModel:
    """The model in the class that `stock_config` finds, else the model itself.

    Weights are shared with `model`, but for those that this class holds in one linear.
    """
    config = stock_config(model.config)
    if config is None:
        return model
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    config.dtype = model.dtype
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    stock.load_state_dict(joined(model.state_dict(), FAMILIES[config.model_type]), assign=True)
    complete(stock, model)
    return stock.train(model.training)


def save_model(model: PreTrainedModel, folder: Path, *, stock: bool = True) -> None:
    """Writes config.json and the weights as safetensors; stock: in a class of transformers' own where there is one.

    `rope_theta` and `rope_scaling` stand beside transformers' `rope_parameters` in config.json, because the converters
    of llama.cpp and mlx-lm look there.
    """
    (as_stock(model) if stock else model).save_pretrained(folder, safe_serialization=True)
    rope_for_converters(folder)


def rope_for_converters(folder: Path) -> None:
    """Repeats the RoPE settings of a config.json at its top level."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if rope is None:  # a family without RoPE, or with a name of its own for it
        return
    if "full_attention" in rope:  # parameters by layer type, of which Gemma 3's sliding layers have a base of their own
        if config["model_type"].endswith("gemma3_text"):
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    write_json(folder / "config.json", config)
