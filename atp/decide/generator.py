"""The pruning-decision generator: a small network whose only input is one fixed code per layer.

It sees no weights and no data and learns only through gradients of the masks (docs/method.md section 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atp.config import GeneratorKind
from atp.ground.rng import seeded
from atp.spaces.space import MaskSpace


class DecisionGenerator(nn.Module):
    """Maps one fixed orthogonal code per layer [num_layers, width] to one logit per decision, float32 [space.size].

    kind: `transformer` (2 blocks, 4 heads, FFN 256, dropout 0.1; the paper's), `gru` (bidirectional, as in DISP-LLM) or
    `free` (one parameter per decision and no network, to show what the network contributes).
    prior: float32 [space.size] or None, a constant added to the logits (saliency warm start). With it the last weights
    start at zero, so the first logits are the prior. None is the paper's: the first logits are random.
    """

    prior: Tensor
    code: Tensor

    def __init__(
        self,
        space: MaskSpace,
        *,
        kind: GeneratorKind = "transformer",
        width: int = 64,
        dropout: float = 0.1,
        prior: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("prior", torch.zeros(space.size) if prior is None else prior.float().clone())
        self.free = nn.Parameter(torch.zeros(space.size)) if kind == "free" else None
        if kind == "free":
            return
        with seeded(seed):
            code = nn.init.orthogonal_(torch.empty(space.num_layers, width))
            self.encoder = _encoder(kind, width, dropout)
            self.norm = nn.LayerNorm(width)
            self.heads = nn.ModuleList(nn.Linear(width, s.size, bias=False) for s in space.structures)
        if prior is not None:
            for head in self.heads.parameters():
                nn.init.zeros_(head)
        self.layer_of_head = [s.layer for s in space.structures]
        self.register_buffer("code", code)

    def forward(self) -> Tensor:
        """Logits of all decisions in the order of the space, float32 [space.size]; larger keeps."""
        if self.free is not None:
            return self.free + self.prior
        hidden: Any = self.encoder(self.code.unsqueeze(0))
        hidden = self.norm(hidden[0] if isinstance(hidden, tuple) else hidden).squeeze(0)
        logits = [head(hidden[layer]) for head, layer in zip(self.heads, self.layer_of_head, strict=True)]
        return torch.cat(logits) + self.prior


def _encoder(kind: GeneratorKind, width: int, dropout: float) -> nn.Module:
    if kind == "gru":
        return nn.GRU(width, width // 2, num_layers=2, batch_first=True, bidirectional=True, dropout=dropout)
    block = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=dropout, batch_first=True)
    return nn.TransformerEncoder(block, num_layers=2, enable_nested_tensor=False)
