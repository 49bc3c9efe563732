"""Benchmark cases of group lasso and its proximal step, over all LoRA factors of a model at once."""

from functools import partial

import torch
from torch import Tensor

from atp_kernels import GroupPlan, group_lasso, group_lasso_grad_, group_prox_
from benchmarks.case import Case, Op, Variant, Variants, Work
from benchmarks.linears import by_backend
from benchmarks.shapes import Model

_TESTS = (
    "tests/atp_kernels/test_groups.py",
    "tests/atp_kernels/test_groups_direct.py",
    "tests/atp_kernels/test_native.py",
)
_INPUT_SIDE = ("o_proj", "down_proj")  # their cuts remove columns of A, those of all others rows of B
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FIRST = ("q_proj", "gate_proj")  # the others lose what the linear before them loses
_EPS = 1e-8
_THRESHOLD = 1e-3  # so small that no group reaches zero however often it is shrunk

_Groups = list[tuple[int, Tensor]]


def factor_shapes(model: Model, rank: int) -> list[tuple[int, int, int]]:
    """(rows, columns, grouped axis) of every factor that a cut touches, layer by layer."""
    layer = [
        (rank, n_in, 1) if name in _INPUT_SIDE else (n_out, rank, 0) for name, (n_out, n_in) in model.linears.items()
    ]
    return layer * model.layers


def problem(case: Case) -> tuple[list[Tensor], _Groups, Tensor]:
    """Random factors, their groups and which of these are removed.

    The part `model` has a group for every row of B or column of A. The part `kv_group` has the groups of the mask space
    of that name: the rows or columns that one key-value head has in q, k, v or o are one group, next to each other, and
    a head or an MLP channel is removed in all of its linears at once.
    """
    rng, sizes = torch.Generator(case.device).manual_seed(0), case.sizes
    joint = case.part == "kv_group"
    factors, groups, start = [], [], 0
    removed: list[Tensor] = []
    names = list(sizes.linears) * sizes.layers
    for name, (rows, columns, axis) in zip(names, factor_shapes(sizes, case.rank), strict=True):
        factors.append(torch.randn(rows, columns, generator=rng, device=case.device).to(case.torch_dtype))
        size = (rows, columns)[axis]
        count = sizes.kv_heads if joint and name in _ATTENTION else size
        index = torch.arange(start, start + count, device=case.device).repeat_interleave(size // count)
        groups.append((axis, index))
        if joint and name not in _FIRST:
            removed.append(removed[-1])
        else:
            removed.append(torch.rand(count, generator=rng, device=case.device) >= case.keep)
            removed[-1][0] = True  # a factor that loses nothing has no gradient to compare
        start += count
    return factors, groups, torch.cat(removed)


def lasso(case: Case) -> Variants:
    """The norms of removed groups, and their gradient added to `.grad`; the floor is one norm over as much memory."""
    factors, groups, removed = problem(case)
    plan = GroupPlan.of(factors, groups, removed.numel())
    inputs = tuple(factor.requires_grad_() for factor in factors)
    for factor in factors:
        factor.grad = torch.zeros_like(factor)  # in a training step the loss's gradients are there
    counts = [int(index[-1] - index[0]) + 1 for _, index in plan.groups]
    grad = torch.ones((), device=case.device)
    flat = torch.cat([factor.detach().flatten() for factor in factors]).requires_grad_()

    def loop() -> Tensor:
        total = torch.zeros((), device=case.device)
        for factor, axis, count, flags in zip(factors, plan.axes, counts, removed.split(counts), strict=True):
            squares = factor.square().sum(1 - axis)
            if count < len(squares):
                squares = squares.view(count, -1).sum(1)
            total = total + (squares + _EPS).sqrt()[flags].sum()
        return total

    def ours(backend: str) -> Variant:
        call = partial(group_lasso, factors, plan, removed, eps=_EPS, backend=backend)
        return Variant(call, inputs, grad, adds=True, holds=(factors, plan))

    direct = partial(group_lasso_grad_, factors, plan, removed, eps=_EPS)
    return {
        "unfused": Variant(loop, inputs, grad, adds=True, holds=(factors,)),
        **by_backend("group_lasso", inputs, ours),
        "ours_direct": Variant(direct, inputs, whole=True, holds=(factors, plan)),
        "floor": Variant(flat.norm, (flat,), grad.to(flat.dtype), same=False, holds=(flat,)),
    }


def prox(case: Case) -> Variants:
    """Shrinking in place; every variant has factors of its own, and the floor scales as much memory once."""
    factors, groups, removed = problem(case)
    flat = torch.cat([factor.flatten() for factor in factors])

    def copies() -> list[Tensor]:
        return [factor.clone() for factor in factors]

    def loop(own: list[Tensor]) -> Tensor:
        for factor, (axis, index) in zip(own, groups, strict=True):
            norms = factor.norm(dim=1 - axis)
            scale = torch.where(removed[index], (1 - _THRESHOLD / norms).clamp_min(0), 1)
            factor.mul_(scale.unsqueeze(1 - axis))
        return own[0]

    def ours(backend: str) -> Variant:
        own = copies()

        def call() -> Tensor:
            group_prox_(own, groups, removed, _THRESHOLD, backend=backend)
            return own[0]

        return Variant(call, holds=(own, groups))

    own = copies()
    return {
        "unfused": Variant(partial(loop, own), holds=(own, groups)),
        **by_backend("group_prox_", tuple(factors), ours),
        "floor": Variant(partial(flat.mul_, 0.999), same=False, holds=(flat,)),
    }


def lasso_work(case: Case) -> dict[str, Work]:
    """Forward reads every factor and writes the norms; backward reads removed parts and writes all gradients."""
    entries, groups = _counts(case)
    item, removed = case.torch_dtype.itemsize, 1 - case.keep
    forward = Work(2 * entries, item * entries + 4 * groups)
    return {"forward": forward, "backward": Work(removed * entries, item * entries * (1 + removed) + 4 * groups)}


def prox_work(case: Case) -> dict[str, Work]:
    """Removed parts are read and written, once each."""
    entries, _ = _counts(case)
    removed = (1 - case.keep) * entries
    return {"forward": Work(3 * removed, 2 * removed * case.torch_dtype.itemsize)}


def _counts(case: Case) -> tuple[int, int]:
    """Entries of all factors and number of groups."""
    shapes, sizes = factor_shapes(case.sizes, case.rank), case.sizes
    groups = sum(shape[shape[2]] for shape in shapes)
    if case.part == "kv_group":
        groups = sizes.layers * (4 * sizes.kv_heads + 3 * sizes.inner)
    return sum(rows * columns for rows, columns, _ in shapes), groups


def _lasso_parts(model: Model) -> tuple[str, ...]:
    return ("model", "kv_group")


def _whole_model(model: Model) -> tuple[str, ...]:
    return ("model",)


OPS = (
    Op("group_lasso", lasso, lasso_work, _lasso_parts, _TESTS, ignores=("tokens",)),
    Op("group_prox", prox, prox_work, _whole_model, _TESTS, passes=("forward",), ignores=("tokens",)),
)
