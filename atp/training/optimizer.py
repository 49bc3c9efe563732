"""AdamW for LoRA, whose steps may be bounded by how much its gradients surprise it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from atp.config import TrainingConfig

CLIPS = "update_clipping"
"""Key of a parameter group: whether its updates are clipped."""


def adamw(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> AdamW:
    """The optimizer of an adapter's parameters; its rate, and whether it clips updates, are set before each step.

    It is fused: it reads nothing back to the host, and a tensor can tell it to skip a step.
    """
    betas = (0.9, config.second_moment)
    optimizer = AdamW(parameters, lr=0.0, betas=betas, weight_decay=0.0, fused=True)
    optimizer.param_groups[0][CLIPS] = False
    _clip_updates(optimizer)
    return optimizer


def _clip_updates(optimizer: AdamW) -> None:
    """While the first group's `CLIPS` is set, a step in a parameter is divided by max(1, rms(g / sqrt(v))).

    g is the parameter's gradient and v the second moment, bias-corrected, after the step. The quotient is about 1 while
    gradients are as large as they were, and larger where v is too small for them, which is when AdamW's steps are too
    large (StableAdamW, arXiv 2304.13013, section 3.5; update clipping, arXiv 1804.04235, section 6). A step that is
    skipped stays one that changes nothing. The host reads nothing back.
    """
    before: list[Tensor] = []

    @torch.no_grad()
    def remember(optimizer: Optimizer, *_: Any) -> None:
        before[:] = [p.clone() for p in _stepped(optimizer)] if optimizer.param_groups[0][CLIPS] else []

    @torch.no_grad()
    def clip(optimizer: Optimizer, *_: Any) -> None:
        if not before:
            return
        group, parameters = optimizer.param_groups[0], _stepped(optimizer)
        states = [optimizer.state[p] for p in parameters]
        surprises = (
            p.grad / state["exp_avg_sq"].sqrt().add_(group["eps"]) for p, state in zip(parameters, states, strict=True)
        )
        rms = torch.stack([torch.linalg.vector_norm(g) * max(g.numel(), 1) ** -0.5 for g in surprises])
        rms *= (1 - group["betas"][1] ** torch.stack([state["step"] for state in states])).sqrt()
        # Of the way back; a gradient that is not finite goes none of it, for its step was skipped.
        back = torch.where(rms > 1, 1 - 1 / rms, 0.0)
        for p, old, share in zip(parameters, before, back.unbind(), strict=True):
            p.lerp_(old, share)
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(clip)


def _stepped(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
