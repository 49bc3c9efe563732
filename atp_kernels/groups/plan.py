"""The groups of many factors, checked and packed once for any number of calls."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from atp_kernels.checks import refuse_capture
from atp_kernels.groups.definition import Groups
from atp_kernels.kinds import typed


class GroupPlan:
    """What a backend needs to know about the groups of a list of factors; make one with `GroupPlan.of`.

    Rows (axis 0) or columns (axis 1) of all factors, one factor after the other, are the slots of the plan.
    axes, shapes: axis and shape of every factor. index: int32 [slots], the group of each slot. order: int32 [slots],
    the slots sorted by group, ascending within a group. starts: int32 [n_groups + 1]: the slots of group g are
    order[starts[g]:starts[g + 1]], none for an empty group. These three lie on the device of the factors. A caller gets
    copies and can assign nothing, since kernels read and write where the plan's own values say. runs: every group is a
    run of neighbouring slots of one factor, in order, and none is empty; only known for plans on a CPU. separate: in
    addition, every group is one slot, so that slot i is group i: one norm per row or column.

    A backend is the functions of aten.py. Factors have passed `check`, except those of `group_lasso_grad_`, which
    calls it. A backend reads `_index`, `_order` and `_starts` and may trust their values, which `of` or `unpack` has
    checked. What it keeps in `_tables` lives as long as the plan. Gradients may be pieces of one allocation. A backend
    that also has `separate_lasso_forward` and `separate_lasso_backward` gets separate plans of factors of one dtype
    there.

    >>> rows, columns = (0, torch.tensor([0, 1])), (1, torch.tensor([0, 1]))
    >>> GroupPlan.of([torch.ones(2, 3), torch.ones(3, 2)], [rows, columns], n_groups=2)
    GroupPlan(2 factors, 2 groups, cpu)
    """

    def __init__(
        self,
        axes: tuple[int, ...],
        shapes: tuple[torch.Size, ...],
        index: Tensor,
        order: Tensor,
        starts: Tensor,
        runs: bool = False,
    ) -> None:
        self._axes, self._shapes, self._runs = axes, shapes, runs
        self._index, self._order, self._starts = index, order, starts
        self._tables: dict[tuple[Hashable, ...], Tensor] = {}
        self._checked = False  # operations refuse what neither `of` nor `unpack` has checked

    @classmethod
    @typed
    def of(cls, factors: Sequence[Tensor], groups: Groups, n_groups: int) -> GroupPlan:
        """The plan of `groups` as in `group_lasso`, for factors of these shapes on this device.

        Values of the factors are not read, so the plan holds until a shape or the device changes. Raises ValueError
        for wrong shapes or dtypes or two devices, and on a CPU, where reading ids waits for nothing, for an id out of
        range; RuntimeError while a CUDA graph is captured.
        """
        _check(factors, groups)
        refuse_capture(factors[0].device, "the making of a GroupPlan", "make it before and hand it to the operations")
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
        plan = cls(tuple(axis for axis, _ in groups), shapes, index, order, starts, runs)
        plan._checked = True
        return plan

    @classmethod
    def unpack(cls, factors: Sequence[Tensor], axes: Sequence[int], *tensors: Tensor) -> GroupPlan:
        """The plan of (index, order, starts) that an operator of `torch.ops` was given for these factors.

        On a CPU, where reading them waits for nothing, raises ValueError for values that no plan of such factors has.
        """
        index, order, starts = (tensor.int().contiguous() for tensor in tensors)
        plan = cls(tuple(axes), tuple(factor.shape for factor in factors), index, order, starts)
        if tensors[0].device.type == "cpu" and not plan._is_consistent():
            raise ValueError("index, order and starts are those of no plan for these factors: take them from one.")
        plan._checked = True
        return plan

    def _is_consistent(self) -> bool:
        """Whether index, order and starts agree with each other and stay within the factors and groups."""
        slots = sum(shape[axis] for shape, axis in zip(self.shapes, self.axes, strict=True))
        if self._index.shape != (slots,) or self._order.shape != (slots,) or self._starts.numel() == 0:
            return False
        for values, end in ((self._index, self.n_groups), (self._order, slots)):
            if bool(((values < 0) | (values >= end)).any()):
                return False
        counts = torch.bincount(self._index, minlength=self.n_groups)
        owners = torch.arange(self.n_groups, dtype=torch.int32).repeat_interleave(counts)
        in_order = torch.equal(self._index[self._order], owners)
        return in_order and int(self._starts[0]) == 0 and torch.equal(self._starts.diff(), counts.int())

    def __repr__(self) -> str:
        return f"GroupPlan({len(self.axes)} factors, {self.n_groups} groups, {self.device})"

    @property
    def axes(self) -> tuple[int, ...]:
        """0 or 1 for every factor: its rows are slots, or its columns."""
        return self._axes

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The shape of every factor."""
        return self._shapes

    @property
    def runs(self) -> bool:
        """Whether every group is a run of neighbouring slots of one factor, in order, and none owns nothing."""
        return self._runs

    @property
    def index(self) -> Tensor:
        """int32 [slots]: the group of each slot, as a copy."""
        return self._index.clone()

    @property
    def order(self) -> Tensor:
        """int32 [slots]: the slots sorted by group, as a copy."""
        return self._order.clone()

    @property
    def starts(self) -> Tensor:
        """int32 [n_groups + 1]: where each group begins in `order`, as a copy."""
        return self._starts.clone()

    @property
    def device(self) -> torch.device:
        """Where the plan and its factors lie."""
        return self._index.device

    @property
    def n_groups(self) -> int:
        """The number of groups, including empty ones."""
        return self._starts.shape[0] - 1

    @cached_property
    def separate(self) -> bool:
        """Whether every group is one slot."""
        return self.runs and self.n_groups == self._index.numel()

    @cached_property
    def sides(self) -> tuple[int, ...]:
        """Rows and columns of every factor, one after the other."""
        return tuple(side for shape in self.shapes for side in shape)

    @property
    def groups(self) -> list[tuple[int, Tensor]]:
        """(axis, int32 index) of every factor, as a copy: the plan as the plain list it came from."""
        return [(axis, index.clone()) for axis, index in self._groups]

    @property
    def _groups(self) -> list[tuple[int, Tensor]]:
        sizes = [shape[axis] for shape, axis in zip(self.shapes, self.axes, strict=True)]
        return list(zip(self.axes, self._index.split(sizes), strict=True))

    @property
    def owned(self) -> Tensor:
        """bool [n_groups]: which groups own at least one slot."""
        return self._starts.diff() > 0

    def check(self, factors: Sequence[Tensor]) -> None:
        """Raises ValueError for factors that the plan was not made for: their number, a shape or the device differs."""
        shapes = tuple([factor.shape for factor in factors])
        if shapes != self.shapes:
            raise ValueError(
                f"the plan was made for {len(self.shapes)} factors of other shapes: make a new one with GroupPlan.of."
            )
        if {factor.device for factor in factors} != {self.device}:
            raise ValueError(f"the plan lies on {self.device} and factors elsewhere: make a new one for them.")


def _are_runs(index: Tensor, sizes: Sequence[int], n_groups: int) -> bool:
    """Whether ids start at 0, rise by 0 or 1 from slot to slot, and rise by 1 from one factor to the next."""
    steps = index.diff(prepend=index.new_tensor([-1]))
    borders = torch.tensor(sizes[:-1], dtype=torch.int64).cumsum(0)
    new = steps[borders[borders < len(index)]] == 1
    return int(index[-1]) == n_groups - 1 and bool(((steps == 0) | (steps == 1)).all() and new.all())


def _check(factors: Sequence[Tensor], groups: Groups) -> None:
    if not factors or len(factors) != len(groups):
        raise ValueError(f"{len(factors)} factors and {len(groups)} groups: give one (axis, index) for each factor.")
    device = factors[0].device
    for i, (factor, group) in enumerate(zip(factors, groups, strict=True)):
        axis, index = group if len(group) == 2 else (None, factor)
        if factor.ndim != 2 or not factor.is_floating_point():
            given = f"{factor.dtype} of shape {list(factor.shape)}"
            raise ValueError(f"factors[{i}] must be a 2-D floating tensor, not {given}.")
        if axis not in (0, 1) or index.dtype != torch.int64 or index.shape != factor.shape[axis : axis + 1]:
            raise ValueError(f"groups[{i}] must be (0 or 1, int64 index as long as that side of factors[{i}]).")
        if factor.device != device or index.device != device:
            raise ValueError(f"factors[{i}] and its index must be on one device with factors[0], {device}.")
