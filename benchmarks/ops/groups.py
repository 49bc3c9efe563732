"""Operations over all LoRA factors of a model at once, and the gather of a kept weight."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from atp_kernels import GroupPlan, compact, group_lasso, group_lasso_grad_, group_prox_
from benchmarks.case import Case, Op, Variant, Variants, Work
from benchmarks.linears import by_backend
from benchmarks.shapes import Model

_TESTS = (
    "tests/atp_kernels/test_groups.py",
    "tests/atp_kernels/test_groups_direct.py",
    "tests/atp_kernels/test_native.py",
)
_INPUT_SIDE = ("o_proj", "down_proj")  # their cuts take columns of A, all others rows of B
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
    """Random factors, a group for each row of B or column of A, and which groups are removed."""
    rng = torch.Generator(case.device).manual_seed(0)
    factors, groups, start = [], [], 0
    for rows, columns, axis in factor_shapes(case.sizes, case.rank):
        factors.append(torch.randn(rows, columns, generator=rng, device=case.device).to(case.torch_dtype))
        size = (rows, columns)[axis]
        groups.append((axis, torch.arange(start, start + size, device=case.device)))
        start += size
    return factors, groups, torch.rand(start, generator=rng, device=case.device) >= case.keep


def product_problem(case: Case) -> tuple[list[Tensor], GroupPlan, Tensor]:
    """Random factors, the groups that the product's lasso has in the mask space `case.part`, and which are removed."""
    from transformers import LlamaConfig

    from atp.lora.lasso import LoraGroups
    from atp.spaces.space import MaskSpace

    sizes, rng = case.sizes, torch.Generator(case.device).manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.inner, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, head_dim=sizes.head_dim,
    )  # fmt: skip
    space = MaskSpace.from_config(config, case.part)

    def named_parameters() -> Iterator[tuple[str, nn.Parameter]]:
        for structure in space.structures:
            for cut in structure.cuts:
                n_out, n_in = sizes.linears[cut.module.rpartition(".")[2]]
                shape, name = ((case.rank, n_in), "lora_A") if cut.axis else ((n_out, case.rank), "lora_B")
                values = torch.randn(shape, generator=rng, device=case.device).to(case.torch_dtype)
                yield f".layers.{structure.layer}.{cut.module}.{name}.default.weight", nn.Parameter(values)

    groups = LoraGroups(SimpleNamespace(named_parameters=named_parameters), space)
    mask = torch.rand(space.size, generator=rng, device=case.device) < case.keep
    return groups.factors, groups._cuts, ~mask[groups._decision_of_cut]


def lasso(case: Case) -> Variants:
    """The norms of removed groups, and their gradient added to `.grad`; the floor is one norm over as much memory.

    The part `model` has a group for every row or column, a mask space those of the product: rows and columns of a head
    are one, next to each other.
    """
    if case.part == "model":
        factors, groups, removed = problem(case)
        plan = GroupPlan.of(factors, groups, removed.numel())
    else:
        factors, plan, removed = product_problem(case)
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


def gather(case: Case) -> Variants:
    """Kept rows and columns of one weight; the floor copies a matrix of the kept size."""
    rng = torch.Generator(case.device).manual_seed(0)
    weight = torch.randn(*case.linear, generator=rng, device=case.device).to(case.torch_dtype)
    rows, columns = (
        (torch.rand(size, generator=rng, device=case.device) < case.keep).nonzero().flatten() for size in case.linear
    )

    def ours(backend: str) -> Variant:
        return Variant(partial(compact, weight, rows, columns, backend=backend), holds=(weight,))

    small = torch.randn(rows.numel(), columns.numel(), device=case.device).to(weight.dtype)
    return {
        "unfused": Variant(lambda: weight[rows][:, columns], holds=(weight,)),
        **by_backend("compact", (weight,), ours),
        "floor": Variant(small.clone, same=False, holds=(small,)),
    }


def lasso_work(case: Case) -> dict[str, Work]:
    """Forward reads every factor and writes a norm a group; backward reads removed parts and writes all gradients."""
    entries, groups = _counts(case)
    item, removed = case.torch_dtype.itemsize, 1 - case.keep
    forward = Work(2 * entries, item * entries + 4 * groups)
    return {"forward": forward, "backward": Work(removed * entries, item * entries * (1 + removed) + 4 * groups)}


def prox_work(case: Case) -> dict[str, Work]:
    """Removed parts are read and written, once each."""
    entries, _ = _counts(case)
    removed = (1 - case.keep) * entries
    return {"forward": Work(3 * removed, 2 * removed * case.torch_dtype.itemsize)}


def gather_work(case: Case) -> dict[str, Work]:
    """The kept part is read and written, once each, with its two index vectors."""
    rows, columns = (round(size * case.keep) for size in case.linear)
    return {"forward": Work(0, 2 * rows * columns * case.torch_dtype.itemsize + 8 * (rows + columns))}


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


GROUPS = (
    Op("group_lasso", lasso, lasso_work, _lasso_parts, _TESTS, ignores=("tokens",)),
    Op("group_prox", prox, prox_work, _whole_model, _TESTS, passes=("forward",), ignores=("tokens",)),
    Op("compact", gather, gather_work, lambda model: model.shapes, _TESTS, ("forward",), ("tokens", "rank")),
)
