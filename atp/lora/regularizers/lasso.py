"""The paper's group lasso over the LoRA part of removed decisions."""

from __future__ import annotations

from torch import Tensor

from atp.lora.lasso import LoraGroups
from atp.lora.regularizers.regularizer import Regularizer


class Lasso(Regularizer):
    """R = L_GL, the sum of the norms of removed LoRA groups (docs/method.md section 4).

    Its gradient has norm `weight` per removed group: 81 for SmolLM2's 74,000 groups and weight 0.3, beside a clip of 1.
    It is therefore added after clipping. Clipped together, little would be left of the loss's gradient until the cut,
    and AdamW's second moments would be too small after it.
    """

    def __init__(self, groups: LoraGroups) -> None:
        self.groups = groups

    def add_gradient(self, mask: Tensor, weight: float) -> dict[str, Tensor]:
        # Without autograd: every process adds the same to gradients that are reduced already.
        return {"lasso": self.groups.lasso_grad_(mask, weight)} if weight else {}
