"""Projections that a family's class of transformers holds in one linear: split on loading, joined for that class again.

A decision owns rows of single projections, and LoRA on a fused linear would share one factor between them. So a model
is trained and cut in the class of cut models (`atp.models.cut`), where each projection is a linear of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.families import FAMILIES, Family, declared
from atp.models.config import CutConfig
from atp.models.cut import build, complete


@torch.no_grad()
def split_projections(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with a linear for each projection; any other model as it is.

    model: a whole causal LM in memory, of any family, not quantized. It is spent where it is split: weights are copied
    linear by linear, so that one of them is there twice. Dropout between blocks is left out, as in all cut models.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None or not family.fused:
        return model
    dropout = {} if declared(model.config, "resid_pdrop", None) is None else {"resid_pdrop": 0.0}
    config = CutConfig.from_whole(model.config, **dropout)
    config.dtype = model.dtype
    with torch.device("meta"):
        split = build(config)
    linears, source = family.linears(config), model
    for layer in source.get_decoder().layers:
        for name, parts in family.fused.items():
            block, _, last = name.partition(".")
            module: Any = layer.get_submodule(block)
            weights = getattr(module, last).weight.split([linears[part].out_features for part in parts])
            copies = [weight.clone() for weight in weights]
            delattr(module, last)
            del weights  # before the next linear is copied
            for part, weight in zip(parts, copies, strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
                setattr(module, part.removeprefix(f"{block}."), linear)
    split.load_state_dict(source.state_dict(), assign=True)
    complete(split, source)
    made: PreTrainedModel = split.train(source.training)
    return made


def joined(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The state dict of a causal LM with split projections, as transformers' class of the family takes it.

    Fused weights are new memory, all others are shared.
    """
    made = dict(state)
    for name in state:
        for fused, parts in family.fused.items():
            if name.endswith(f".{parts[0]}.weight"):
                layer = name.removesuffix(f"{parts[0]}.weight")
                made[f"{layer}{fused}.weight"] = torch.cat([made.pop(f"{layer}{part}.weight") for part in parts])
    return made
