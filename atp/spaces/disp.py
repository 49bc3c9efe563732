"""Mask space `disp`, that of DISP-LLM (Gao et al. 2024, arXiv 2410.11988): each block selects what it reads and writes.

A block reads some positions of the normed hidden state and adds its output to others. The residual stream keeps its
width, so the selections of a layer are independent of each other and of other layers. Attention heads stay whole, and
so do norms, which are over the whole hidden state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from atp.families import Linear
from atp.spaces.mlp import mlp_channels, mlp_linears
from atp.spaces.space import CUDA_WIDTHS, WIDTHS, Cut, Structure


def structures(config: PretrainedConfig, linears: dict[str, Linear]) -> list[Structure]:
    """Four selections of the hidden state, and the channels of the MLP.

    Nothing upstream of a selection is masked for it, so a soft mask multiplies all its sides. None may be reordered,
    because the residual stream has one order. None has a reader: the linears that read a selection do not end their
    block, and no refit can replace outputs that are not written.
    """
    hidden = torch.arange(config.hidden_size)
    *producers, reader = mlp_linears(linears)
    # For each structure the axis and the linears that it cuts; on that axis their positions are the hidden state's.
    selections = {
        "attention_inputs": (1, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        "attention_outputs": (0, ["self_attn.o_proj"]),
        "mlp_inputs": (1, producers),
        "mlp_outputs": (0, [reader]),
    }
    return [
        Structure(
            name, len(hidden), tuple(Cut(module, axis, hidden) for module in modules), _widths,
            multiples=WIDTHS, cuda_multiples=CUDA_WIDTHS,
        )
        for name, (axis, modules) in selections.items()
    ] + [mlp_channels(linears)]  # fmt: skip


def _widths(structure: Structure, kept: Tensor) -> dict[str, Any]:
    return {} if bool(kept.all()) else {structure.name: kept.nonzero().flatten().tolist()}
