"""Decoder linears in 4 or 8 bits while they are frozen (`model.load_in`): what LoRA and decisions train over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.families import Linear
from atp.ground.errors import InputError
from atp.spaces.space import MaskSpace
from atp_kernels import QuantizedWeight

_SCALE = 4  # bytes, float32


@dataclass(frozen=True)
class Form:
    """How a frozen linear is held.

    says: for people. make: quantizes a weight. bits: of a code. block: weights of a row that share a scale, None for a
    whole row. packages: import names of what it needs.
    """

    says: str
    make: Callable[[Tensor], QuantizedWeight]
    bits: int
    block: int | None
    packages: tuple[str, ...]

    def bytes_of(self, linear: Linear) -> int:
        """What the weight of a linear takes, its bias left out."""
        scales = linear.out_features * (1 if self.block is None else linear.in_features // self.block)
        return linear.out_features * linear.in_features * self.bits // 8 + scales * _SCALE


FORMS = {
    "4bit": Form("4-bit NormalFloat with a scale per 64 weights", QuantizedWeight.nf4, 4, 64, ("bitsandbytes",)),
    # Not bitsandbytes' own 8-bit layer, which also rounds activations, and not fp8, which is three times as far from
    # SmolLM2's weights at the same size (docs/plan.md).
    "8bit": Form("8-bit integers with a scale per row", QuantizedWeight.int8, 8, None, ()),
}
"""By the name in `model.load_in`."""


def check_base(load_in: str, space: MaskSpace) -> None:
    """Raises `InputError` for experts, and for a linear whose rows are not whole blocks of scales."""
    block = FORMS[load_in].block
    if len(space.adapted) < len(space.modules):
        raise InputError(f"model.load_in={load_in} takes linears, and experts are none: leave it out")
    for layer in range(space.num_layers):
        for name, linear in space.present(layer).items():
            if block is not None and linear.in_features % block:
                raise InputError(
                    f"model.load_in={load_in} takes linears of a multiple of {block} inputs, but layers.{layer}.{name} "
                    f"has {linear.in_features}: use model.load_in=8bit"
                )


@torch.no_grad()
def quantize_base(model: PreTrainedModel, load_in: str, space: MaskSpace) -> None:
    """Quantizes the linears of all decoder layers, one after the other; embeddings, norms, biases and head stay.

    model: a plain causal LM in memory, with the shapes of the space. Its floating weights are let go one by one.
    """
    layers: Any = model.get_decoder().layers
    for index, layer in enumerate(layers):
        for name in space.present(index):
            linear = layer.get_submodule(name)
            linear.weight = nn.Parameter(FORMS[load_in].make(linear.weight), requires_grad=False)
