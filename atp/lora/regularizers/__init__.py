"""Regularizers by the name they have in `training.regularizer`. A new one is a file here and a line below."""

from __future__ import annotations

from torch import nn

from atp.lora.regularizers.l0 import L0Gates
from atp.lora.regularizers.lasso import Lasso, LoraGroups
from atp.lora.regularizers.regularizer import Regularizer
from atp.spaces.space import MaskSpace


def make_regularizer(name: str, model: nn.Module, space: MaskSpace, groups: LoraGroups, *, seed: int) -> Regularizer:
    """The regularizer of this name for a model on the device where it trains. groups: the model's own.

    Where decisions touch no LoRA, the one that does nothing.
    """
    makers = {
        "lasso": lambda: Lasso(groups),
        "l0": lambda: L0Gates(model, space, seed=seed),
    }
    return makers[name]() if groups.factors else Regularizer()


__all__ = ["L0Gates", "Lasso", "Regularizer", "make_regularizer"]
