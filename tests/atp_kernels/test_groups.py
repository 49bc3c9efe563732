"""Group lasso, its proximal step and compaction, on the reference backend and through the public functions."""

import math

import pytest
import torch
from backends_here import DEVICE, backends
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_kernels import GroupPlan, compact, group_lasso, group_prox_
from atp_kernels.groups import definition

REFERENCE = {"backend": "reference"}


def problem(dtype=torch.float64, seed=0, n_groups=6):
    """Rows of B factors and columns of A factors that share groups, as one cut touches several modules."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (((8, 3), 0), ((4, 10), 1), ((5, 2), 0))
    factors, groups = [], []
    for shape, axis in shapes:
        factors.append(torch.randn(shape, generator=rng).to(dtype).requires_grad_())
        # The last group owns nothing.
        groups.append((axis, torch.randint(n_groups - 1, (shape[axis],), generator=rng)))
    return factors, groups, torch.tensor([True, False, True, True, False, True])


def by_hand(factors, groups, removed, eps):
    """The value in plain Python, entry by entry."""
    squares, owned = [0.0] * len(removed), set()
    for factor, (axis, index) in zip(factors, groups, strict=True):
        for i, row in enumerate(factor.tolist()):
            for j, entry in enumerate(row):
                group = index[(i, j)[axis]].item()
                squares[group] += entry**2
                owned.add(group)
    return sum(math.sqrt(squares[g] + eps) for g in owned if removed[g])


@pytest.mark.parametrize("eps", [1e-8, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_group_lasso_is_the_sum_of_joint_norms(dtype, eps):
    factors, groups, removed = problem(dtype)
    for lasso in (group_lasso, definition.group_lasso):
        value = lasso(factors, groups, removed, eps=eps)
        assert value.dtype == dtype and value.shape == ()
        assert value.item() == pytest.approx(by_hand(factors, groups, removed, eps), rel=4 * torch.finfo(dtype).eps)


def test_group_lasso_gradient():
    factors, groups, removed = problem()
    assert torch.autograd.gradcheck(lambda *fs: group_lasso(fs, groups, removed), factors)
    group_lasso(factors, groups, removed).backward()
    kept = ~removed[groups[0][1]]
    assert (factors[0].grad[kept] == 0).all() and (factors[0].grad[~kept] != 0).all()


def test_group_lasso_gradient_at_zero_is_zero():
    factors, groups, removed = problem()
    zeros = [torch.zeros_like(factor).requires_grad_() for factor in factors]
    for eps in (1e-8, 0.0):
        grads = torch.autograd.grad(group_lasso(zeros, groups, removed, eps=eps), zeros)
        assert all((grad == 0).all() for grad in grads)


def test_group_prox_solves_its_minimisation():
    """prox(v) is the minimiser of 0.5 * ||u - v||^2 + threshold * ||u||: its optimality condition holds exactly."""
    factors, groups, removed = problem()
    threshold = torch.tensor([0.7, 9.0, 100.0, 1.3, 9.0, 1.0], dtype=torch.float64)
    before = [factor.detach().clone() for factor in factors]
    group_prox_(factors, groups, removed, threshold, **REFERENCE)
    norms = definition.group_squares([f.detach() for f in factors], groups, len(removed)).sqrt()
    for factor, start, (axis, index) in zip(factors, before, groups, strict=True):
        along = lambda values, axis=axis, index=index: values[index].unsqueeze(1 - axis)  # noqa: E731
        residual = torch.where(along(norms) > 0, factor - start + along(threshold / norms) * factor, 0)
        torch.testing.assert_close(torch.where(along(removed), residual, 0), torch.zeros_like(start))
        assert torch.equal(torch.where(along(removed), start, factor), start)  # kept groups are untouched
        assert (torch.where(along(torch.arange(6) == 2), factor, 0) == 0).all()  # below its threshold: exact zeros


indices = st.one_of(st.none(), st.lists(st.integers(0, 6), max_size=9))


@given(rows=indices, cols=indices, pad_to=st.sampled_from([1, 4, 8]), backend=st.sampled_from(["auto", "reference"]))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_compact_gathers_and_pads(rows, cols, pad_to, backend):
    weight = torch.arange(1.0, 50.0).view(7, 7)
    index = [None if side is None else torch.tensor(side, dtype=torch.int64) for side in (rows, cols)]
    result = compact(weight, *index, pad_to, backend=backend)
    kept_rows, kept_cols = (range(7) if side is None else side for side in (rows, cols))
    size = [len(kept) if side is None else -(-len(kept) // pad_to) * pad_to
            for kept, side in ((kept_rows, rows), (kept_cols, cols))]  # fmt: skip
    expected = [[0.0] * size[1] for _ in range(size[0])]
    for i, row in enumerate(kept_rows):
        for j, col in enumerate(kept_cols):
            expected[i][j] = 1.0 + 7 * row + col
    assert result.shape == tuple(size) and result.tolist() == expected


def test_compact_of_a_parameter_is_a_new_tensor_without_gradient():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    result = compact(weight)
    result.zero_()
    assert not result.requires_grad and (weight == 1).all()


def test_wrong_groups_are_one_clear_sentence():
    factors, groups, removed = problem()
    index = groups[0][1]
    for changed, message in (
        ((factors, groups[:2], removed), "3 factors and 2 groups"),
        ((factors, [(2, index), *groups[1:]], removed), r"groups\[0\] must be"),
        ((factors, [(0, index[:-1]), *groups[1:]], removed), r"groups\[0\] must be"),
        ((factors, [(0, index.int()), *groups[1:]], removed), r"groups\[0\] must be"),
        ((factors, groups, removed.float()), "removed must be a 1-D bool tensor"),
        (([factors[0][0], *factors[1:]], groups, removed), r"factors\[0\] must be a 2-D"),
    ):
        with pytest.raises(ValueError, match=message):
            group_lasso(*changed)
    for id_ in (6, -1):
        with pytest.raises(ValueError, match=r"must lie in \[0, 6\)"):
            group_lasso(factors, [(0, torch.full_like(index, id_)), *groups[1:]], removed)
    with pytest.raises(ValueError, match="threshold has shape"):
        group_prox_(factors, groups, removed, torch.ones(2))
    with pytest.raises(ValueError, match=r"cols is a mask of shape \[2\]: give bool \[3\]"):
        compact(torch.ones(3, 3), cols=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="pad_to is 0"):
        compact(torch.ones(3, 3), pad_to=0)


def test_factors_of_mixed_dtypes_find_a_backend():
    """Half and bfloat16 together: native takes no half, so the call must not go there."""
    factors = [torch.full((2, 3), 2.0, dtype=torch.float16), torch.full((2, 3), 1.0, dtype=torch.bfloat16)]
    groups = [(0, torch.tensor([0, 1])), (0, torch.tensor([0, 1]))]
    value = group_lasso(factors, groups, torch.tensor([True, False]))
    assert float(value) == pytest.approx((3 * 4 + 3 * 1) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("backend", backends("group_prox_"))
def test_prox_keeps_a_nan_visible(backend):
    """A group that went wrong must not turn into a clean zero, whose cut the certificate would pass."""
    factor = torch.tensor([[torch.nan, 1.0], [3.0, 4.0]], device=DEVICE)
    removed = torch.tensor([True, True], device=DEVICE)
    group_prox_([factor], [(0, torch.arange(2, device=DEVICE))], removed, 2.5, backend=backend)
    assert factor[0].isnan().any()
    torch.testing.assert_close(factor[1], torch.tensor([1.5, 2.0], device=DEVICE))


def test_a_plan_lists_the_slots_of_every_group():
    factors, groups, removed = problem()
    plan = GroupPlan.of(factors, groups, len(removed))
    ids = torch.cat([index for _, index in groups]).tolist()
    starts = plan.starts.tolist()
    for group in range(len(removed)):
        slots = plan.order[starts[group] : starts[group + 1]].tolist()
        assert slots == [slot for slot, owner in enumerate(ids) if owner == group]
    assert plan.owned.tolist() == [group in ids for group in range(len(removed))]
    assert all(torch.equal(a[1], b[1].int()) for a, b in zip(plan.groups, groups, strict=True))
    assert repr(plan) == "GroupPlan(3 factors, 6 groups, cpu)"


def test_a_stale_plan_is_refused():
    factors, groups, removed = problem()
    plan = GroupPlan.of(factors, groups, len(removed))
    for changed in ([*factors[:2], factors[2][:, :1]], factors[:2], [factors[0][:7], *factors[1:]]):
        with pytest.raises(ValueError, match="made for 3 factors of other shapes"):
            group_lasso(changed, plan, removed)
    with pytest.raises(ValueError, match="plan lies on cpu and factors elsewhere"):
        group_lasso([factor.to("meta") for factor in factors], plan, removed)
    with pytest.raises(ValueError, match="removed has 5 entries, but the plan has 6"):
        group_lasso(factors, plan, removed[:5])
    with pytest.raises(ValueError, match="removed is on meta"):
        group_lasso(factors, plan, removed.to("meta"))
