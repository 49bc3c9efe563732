"""AdamW for what is trained, whose steps may be bounded by how much its gradients surprise it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from atp.config import TrainingConfig
from atp.training.flat import BLOCK, FlatParameters

CLIPS = "update_clipping"
"""Key of a parameter group: whether its updates are clipped."""

_CHUNK = {"cpu": 2**17}
"""Elements that pass after pass goes over while they are in cache; on other devices all of them."""


def adamw(parameters: FlatParameters, config: TrainingConfig, beside: FlatParameters | None = None) -> AdamW:
    """The optimizer of an adapter's parameters, or of all weights; without weight decay.

    A group's rate, and whether it clips updates, are set before each step. beside: parameters with a group, and so a
    rate, of their own. It is fused: it reads nothing back to the host, and a tensor can tell it to skip a step.
    """
    betas = (0.9, config.second_moment)
    flats = [parameters] if beside is None else [parameters, beside]
    groups: list[dict[str, Any]] = [{"params": [flat.flat], CLIPS: False} for flat in flats]
    optimizer = AdamW(groups, lr=0.0, betas=betas, weight_decay=0.0, fused=True)
    for index, flat in enumerate(flats):
        _clip_updates(optimizer, index, flat)
    return optimizer


def _clip_updates(optimizer: AdamW, index: int, parameters: FlatParameters) -> None:
    """While this group's `CLIPS` is set, a step in a parameter is divided by max(1, rms(g / sqrt(v))).

    g is the parameter's gradient and v the second moment, bias-corrected, after the step. The quotient is about 1 while
    gradients are as large as they were, and larger where v is too small for them, which is when AdamW's steps are too
    large (StableAdamW, arXiv 2304.13013, section 3.5; update clipping, arXiv 1804.04235, section 6). A step that is
    skipped stays one that changes nothing. The host reads nothing back.
    """
    flat = parameters.flat
    before: list[Tensor] = []  # the parameters before this step, in memory that lives on: fresh pages cost more
    clips = False
    counts = torch.tensor([p.numel() for p in parameters.parameters.values()], device=flat.device, dtype=flat.dtype)

    @torch.no_grad()
    def remember(optimizer: Optimizer, *_: Any) -> None:
        nonlocal clips
        clips = optimizer.param_groups[index][CLIPS]
        if clips:
            before[:] = [before[0].copy_(flat) if before else flat.clone()]

    @torch.no_grad()
    def clip(optimizer: Optimizer, *_: Any) -> None:
        if not clips:
            return
        group, state = optimizer.param_groups[index], optimizer.state[flat]
        assert flat.grad is not None
        squares = parameters.sum_by_parameter(_squares(flat.grad, state["exp_avg_sq"], group["eps"]))
        rms = (squares / counts.clamp_min(1) * (1 - group["betas"][1] ** state["step"]).to(flat.device)).sqrt()
        # Of the way back; a gradient that is not finite goes none of it, for its step was skipped.
        back = torch.where(rms > 1, 1 - 1 / rms, 0.0)[parameters.owner, None]
        flat.view(-1, BLOCK).lerp_(before[0].view(-1, BLOCK), back)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(clip)


def _squares(gradient: Tensor, second: Tensor, eps: float) -> Tensor:
    """Sums of (g / (sqrt(v) + eps))^2 over blocks of BLOCK elements."""
    size = _CHUNK.get(gradient.device.type, max(1, len(gradient)))
    sums = []
    for g, v in zip(gradient.split(size), second.split(size), strict=True):
        surprise = v.sqrt().add_(eps).reciprocal_().mul_(g)
        sums.append(surprise.view(-1, BLOCK).square_().sum(1))
    return torch.cat(sums)
