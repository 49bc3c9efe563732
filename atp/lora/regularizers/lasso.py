"""Groups of LoRA factors that decisions own: their lasso and their proximal step (docs/method.md section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atp.lora.regularizers.regularizer import Regularizer
from atp.spaces.space import MaskSpace
from atp_kernels import GroupPlan, group_lasso, group_lasso_grad_, group_prox_


class LoraGroups:
    """All LoRA factors that cuts touch, with the group each of their rows or columns belongs to.

    An output cut owns rows of B, an input cut columns of A. For the lasso each cut of a decision is a group of its own
    (the paper's sum of norms); for the proximal step all factors of one decision form one joint group. Build it on the
    device that the model trains on: factors that moved or changed shape afterwards raise an error.
    """

    def __init__(self, model: nn.Module, space: MaskSpace) -> None:
        parameters = {name.split(".layers.")[-1]: p for name, p in model.named_parameters() if ".lora_" in name}
        self.factors: list[nn.Parameter] = []
        cuts: list[tuple[int, Tensor]] = []
        joint: list[tuple[int, Tensor]] = []
        decisions, start = [], 0
        for structure in space.structures:
            for cut in structure.cuts:
                factor = "lora_A" if cut.axis else "lora_B"
                parameter = parameters[f"{structure.layer}.{cut.module}.{factor}.default.weight"]
                owner = cut.owner.to(parameter.device)
                self.factors.append(parameter)
                cuts.append((cut.axis, owner + start))
                joint.append((cut.axis, owner + structure.start))
                decisions.append(torch.arange(structure.start, structure.start + structure.size))
                start += structure.size
        self._decision_of_cut = torch.cat(decisions)
        self._cuts = GroupPlan.of(self.factors, cuts, start)
        self._joint = GroupPlan.of(self.factors, joint, space.size)

    def lasso(self, mask: Tensor) -> Tensor:
        """L_GL: sum over removed cuts of sqrt(sum of squares + 1e-8), scalar float32. mask bool [space.size]."""
        return group_lasso(self.factors, self._cuts, ~mask[self._decision_of_cut])

    def lasso_grad_(self, mask: Tensor, weight: float) -> Tensor:
        """The same without a graph: adds weight times its gradient to the `.grad` of every factor."""
        return group_lasso_grad_(self.factors, self._cuts, ~mask[self._decision_of_cut], weight=weight)

    @torch.no_grad()
    def prox_(self, mask: Tensor, threshold: float) -> None:
        """Shrinks the joint norm of every removed decision by `threshold`, in place, at most to exact zeros."""
        group_prox_(self.factors, self._joint, ~mask, threshold)

    @torch.no_grad()
    def largest_removed_norm(self, mask: Tensor) -> float:
        """The largest joint 2-norm left on a removed decision."""
        squares = torch.zeros(mask.numel())
        for factor, (axis, owner) in zip(self.factors, self._joint.groups, strict=True):
            squares.index_add_(0, owner.cpu(), factor.detach().float().square().sum(1 - axis).cpu())
        removed = squares[~mask.cpu()]
        return float(removed.max().sqrt()) if removed.numel() else 0.0


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
