"""Self-distillation: the model with all its structures, as tuned by the open phase, teaches the one that loses some."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from atp.models.attention import use_training_attention
from atp.removal.masters import as_stored
from atp.training.cross_entropy import SoftTargets
from atp.training.data import Batch
from atp.training.loss import causal_of, head_inputs
from atp.training.profiling import scope


class Teacher:
    """A frozen copy of a LoRA model with the adapter merged in (docs/method.md section 4).

    weight: share of the distance KL(teacher || student) in the loss, the rest is cross-entropy. dtype: that of the
    copied linears, None for that of the weights. Besides the linears, and embeddings that are trained, nothing is
    copied: norms and head are the model's own, which nothing trains before the cut.
    """

    def __init__(self, model: PeftModel, weight: float, dtype: torch.dtype | None) -> None:
        self.weight, self.dtype = weight, dtype
        self.model = as_stored(model).eval().requires_grad_(False)
        parts: tuple[Any, ...] = tuple(part.get_input_embeddings() for part in (causal_of(model), self.model))
        embeddings, theirs = (part.weight for part in parts)
        if embeddings.requires_grad:
            theirs.data = theirs.data.clone()
        use_training_attention(self.model)
        layers: Any = self.model.get_decoder().layers
        for linear in (module for module in layers.modules() if isinstance(module, torch.nn.Linear)):
            linear.weight.data = linear.weight.data.to(dtype or linear.weight.dtype)

    @torch.no_grad()
    def targets(self, batch: Batch) -> SoftTargets:
        """The teacher's predictions of a batch's scored tokens."""
        with scope("teacher"):
            return SoftTargets(*head_inputs(self.model, batch), self.weight)
