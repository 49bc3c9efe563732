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
    device that the model trains on: factors that moved or changed shape afterwards raise an error. What is cut may have
    no LoRA, as experts have none; then there are no factors, and no norm is left on what is removed.
    """

    def __init__(self, model: nn.Module, space: MaskSpace) -> None:
        parameters = {name.split(".layers.")[-1]: p for name, p in model.named_parameters() if ".lora_" in name}
        self.factors: list[nn.Parameter] = []
        cuts: list[tuple[int, Tensor]] = []
        joint: list[tuple[int, Tensor]] = []
        decisions, start = [], 0
        device = next(iter(parameters.values())).device
        for structure in space.to(device).structures:
            for cut in structure.cuts:
                if cut.module not in space.adapted or not structure.size:
                    continue
                factor = "lora_A" if cut.axis else "lora_B"
                parameter = parameters[f"{structure.layer}.{cut.module}.{factor}.default.weight"]
                self.factors.append(parameter)
                cuts.append((cut.axis, cut.owner + start))
                joint.append((cut.axis, cut.owner + structure.start))
                decisions.append(torch.arange(structure.start, structure.start + structure.size, device=device))
                start += structure.size
        self.none = torch.zeros((), device=device)  # of a norm
        if not self.factors:
            return
        self._decision_of_cut = torch.cat(decisions)
        self._cuts = GroupPlan.of(self.factors, cuts, start)
        self._joint = GroupPlan.of(self.factors, joint, space.size)
        self._decision_of_slot = torch.cat([index for _, index in joint])

    def lasso(self, mask: Tensor) -> Tensor:
        """L_GL: sum over removed cuts of sqrt(sum of squares + 1e-8), scalar float32. mask bool [space.size]."""
        return group_lasso(self.factors, self._cuts, ~mask[self._decision_of_cut])

    def lasso_grad_(self, mask: Tensor, weight: float) -> Tensor:
        """The same without a graph: adds weight times its gradient to the `.grad` of every factor."""
        return group_lasso_grad_(self.factors, self._cuts, ~mask[self._decision_of_cut], weight=weight)

    @torch.no_grad()
    def prox_(self, mask: Tensor, threshold: Tensor | float) -> None:
        """Shrinks the joint norm of every removed decision by `threshold`, in place, at most to exact zeros.

        threshold: a number, or a scalar tensor on the device.
        """
        if not self.factors:
            return
        if isinstance(threshold, Tensor):
            threshold = threshold.repeat(mask.numel())
        group_prox_(self.factors, self._joint, ~mask, threshold)

    @torch.no_grad()
    def largest_removed_norm(self, mask: Tensor) -> Tensor:
        """The largest joint 2-norm left on a removed decision, scalar float32 on the device; 0 if none is removed."""
        if not self.factors:
            return self.none
        pairs = zip(self.factors, self._joint.axes, strict=True)
        slots = torch.cat([factor.detach().float().square().sum(1 - axis) for factor, axis in pairs])
        squares = slots.new_zeros(mask.numel())
        if slots.device.type == "cpu":
            squares.index_add_(0, self._decision_of_slot, slots)
        else:
            # Sorts first, so that a resumed run adds in the same order; `index_add_` would add as threads come.
            squares.index_put_((self._decision_of_slot,), slots, accumulate=True)
        return torch.where(mask, 0, squares).max().sqrt()


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
