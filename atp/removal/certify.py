"""The certificate: logits before the cut, after it, and after saving and loading, compared over real tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LogitGap:
    """Largest absolute logit difference, and the same as a share of the largest reference logit."""

    absolute: float
    relative: float


def reference_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Float32 logits [windows, length, vocab] on the CPU, in eval mode. tokens: int64 [windows, length]."""
    return torch.stack([_logits(model, window) for window in tokens])


def compare(reference: Tensor, model: nn.Module, tokens: Tensor) -> LogitGap:
    """Compares `reference_logits` of another model with this one's, one window at a time."""
    scale = float(reference.abs().max())
    gaps = [float((_logits(model, window) - part).abs().max()) for window, part in zip(tokens, reference, strict=True)]
    return LogitGap(max(gaps), max(gaps) / scale)


@torch.no_grad()
def _logits(model: nn.Module, window: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=window.unsqueeze(0), use_cache=False).logits[0].float().cpu()
    finally:
        model.train(was_training)
