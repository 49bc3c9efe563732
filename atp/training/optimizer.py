"""AdamW for LoRA, whose steps may be bounded by how much its gradients surprise it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from atp.config import TrainingConfig


def adamw(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> AdamW:
    """The optimizer of an adapter's parameters, as a training config asks for it.

    It is fused: it reads nothing back to the host, and a tensor can tell it to skip a step.
    """
    betas = (0.9, config.second_moment)
    optimizer = AdamW(parameters, lr=config.lr, betas=betas, weight_decay=0.0, fused=True)
    if config.update_clipping:
        clip_updates(optimizer)
    return optimizer


def clip_updates(optimizer: AdamW) -> None:
    """Divides what each later step changes in a parameter by max(1, rms(g / sqrt(v))).

    g is the parameter's gradient and v the second moment, bias-corrected, after the step. The quotient is about 1 while
    gradients are as large as they were, and larger where v is too small for them, which is when AdamW's steps are too
    large (StableAdamW, arXiv 2304.13013, section 3.5; update clipping, arXiv 1804.04235, section 6). A step that is
    skipped stays one that changes nothing. The host reads nothing back.
    """
    before: list[Tensor] = []

    @torch.no_grad()
    def remember(optimizer: Optimizer, *_: Any) -> None:
        before[:] = [p.clone() for p in _stepped(optimizer)]

    @torch.no_grad()
    def clip(optimizer: Optimizer, *_: Any) -> None:
        parameters = _stepped(optimizer)
        if not parameters:
            return
        group = optimizer.param_groups[0]
        states = [optimizer.state[p] for p in parameters]
        roots = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
        torch._foreach_add_(roots, group["eps"])
        norms = torch._foreach_norm(torch._foreach_div([p.grad for p in parameters if p.grad is not None], roots))
        torch._foreach_mul_(norms, [max(p.numel(), 1) ** -0.5 for p in parameters])
        correction = 1 - group["betas"][1] ** torch.stack([state["step"] for state in states])
        rms = torch.stack(norms) * correction.sqrt()
        # Of the way back; a gradient that is not finite goes none of it, for its step was skipped.
        back = torch.where(rms > 1, 1 - 1 / rms, 0.0)
        torch._foreach_lerp_(parameters, before, back.unbind())
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(clip)


def _stepped(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
