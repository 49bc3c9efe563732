"""The groups of many factors, checked and packed once for any number of calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from atp_kernels.reference import Groups


@dataclass(frozen=True, eq=False, repr=False)
class GroupPlan:
    """What a backend needs to know of the groups of a list of factors; make one with `GroupPlan.of`.

    Rows (axis 0) or columns (axis 1) of all factors, one factor after the other, are the slots of the plan.
    axes, shapes: axis and shape of every factor. index: int32 [slots], the group of each slot. order: int32 [slots],
    the slots sorted by group, ascending within a group. starts: int32 [n_groups + 1]: the slots of group g are
    order[starts[g]:starts[g + 1]], none for a group that owns nothing. The three lie on the device of the factors.
    runs: every group is a run of neighbouring slots of one factor, in order, and none owns nothing; told of plans on a
    CPU alone. separate: even one slot each, so that slot i is group i: one norm a row or column.

    A backend implements `group_lasso_forward(factors, plan, removed, eps)`, `group_lasso_backward(factors, plan,
    removed, norms, grad_out)` and `group_prox_(factors, plan, removed, threshold)`, for factors that passed `check`,
    and `group_lasso_grad_(factors, grads, plan, removed, weight, eps)`, which refuses others itself as `check` does. It
    may trust the values of a plan. Gradients may be pieces of one allocation. One that also has
    `separate_lasso_forward` and `separate_lasso_backward` is called with these for a separate plan and one dtype.
    """

    axes: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    index: Tensor
    order: Tensor
    starts: Tensor
    runs: bool = False

    @classmethod
    def of(cls, factors: Sequence[Tensor], groups: Groups, n_groups: int) -> GroupPlan:
        """The plan of `groups` as in `group_lasso`, for factors of these shapes on this device.

        Values of the factors are not read, so the plan holds until a shape or the device changes. Raises ValueError
        for wrong shapes or dtypes, two devices, or (on a CPU, where looking costs no wait) a group id out of range.
        """
        _check(factors, groups)
        index = torch.cat([index for _, index in groups])
        runs = False
        if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in index.aminmax())
            if low < 0 or high >= n_groups:
                raise ValueError(f"groups hold ids from {low} to {high}: they must lie in [0, {n_groups}).")
            runs = _are_runs(index, [len(index) for _, index in groups], n_groups)
        index = index.int()
        ones = torch.ones(1, dtype=torch.int32, device=index.device).expand_as(index)
        counts = torch.zeros(n_groups + 1, dtype=torch.int32, device=index.device).index_add_(0, index + 1, ones)
        shapes = tuple(factor.shape for factor in factors)
        order = torch.argsort(index, stable=True).int()
        starts = counts.cumsum(0, dtype=torch.int32)
        return cls(tuple(axis for axis, _ in groups), shapes, index, order, starts, runs)

    def __repr__(self) -> str:
        return f"GroupPlan({len(self.axes)} factors, {self.n_groups} groups, {self.index.device})"

    @property
    def n_groups(self) -> int:
        """The number of groups, those that own nothing included."""
        return self.starts.shape[0] - 1

    @cached_property
    def separate(self) -> bool:
        """Whether every group is one slot."""
        return self.runs and self.n_groups == self.index.numel()

    @cached_property
    def sides(self) -> list[int]:
        """Rows and columns of every factor, one after the other."""
        return [side for shape in self.shapes for side in shape]

    @property
    def groups(self) -> list[tuple[int, Tensor]]:
        """(axis, int32 index) of every factor: the plan as the plain list it came from."""
        sizes = [shape[axis] for shape, axis in zip(self.shapes, self.axes, strict=True)]
        return list(zip(self.axes, self.index.split(sizes), strict=True))

    @property
    def owned(self) -> Tensor:
        """bool [n_groups]: which groups own at least one slot."""
        return self.starts.diff() > 0

    def check(self, factors: Sequence[Tensor]) -> None:
        """Raises ValueError for factors that the plan was not made for: their number, a shape or the device differs."""
        shapes = tuple([factor.shape for factor in factors])
        if shapes != self.shapes:
            raise ValueError(
                f"the plan was made for {len(self.shapes)} factors of other shapes: make a new one with GroupPlan.of."
            )
        if {factor.device for factor in factors} != {self.index.device}:
            raise ValueError(f"the plan lies on {self.index.device} and factors elsewhere: make a new one for them.")


def _are_runs(index: Tensor, sizes: Sequence[int], n_groups: int) -> bool:
    """Whether ids never fall or skip one, and never stay the same from one factor to the next."""
    steps = index.diff(prepend=index.new_tensor([-1]))
    borders = torch.tensor(sizes[:-1], dtype=torch.int64).cumsum(0)
    new = steps[borders[borders < len(index)]] == 1
    return int(index[-1]) == n_groups - 1 and bool(((steps == 0) | (steps == 1)).all() and new.all())


def _check(factors: Sequence[Tensor], groups: Groups) -> None:
    if not factors or len(factors) != len(groups):
        raise ValueError(f"{len(factors)} factors and {len(groups)} groups: give one (axis, index) for each factor.")
    device = factors[0].device
    for i, (factor, (axis, index)) in enumerate(zip(factors, groups, strict=True)):
        if factor.ndim != 2 or not factor.is_floating_point():
            given = f"{factor.dtype} of shape {list(factor.shape)}"
            raise ValueError(f"factors[{i}] must be a 2-D floating tensor, not {given}.")
        if axis not in (0, 1) or index.dtype != torch.int64 or index.shape != factor.shape[axis : axis + 1]:
            raise ValueError(f"groups[{i}] must be (0 or 1, int64 index as long as that side of factors[{i}]).")
        if factor.device != device or index.device != device:
            raise ValueError(f"factors[{i}] and its index must be on one device with factors[0], {device}.")
