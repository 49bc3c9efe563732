"""Group operations in C++ on factors of many tiles, on many blocks of groups and over long sums, against float64."""

import pytest
import torch
from test_native import DTYPES, EPS, exact, problem

from atp_kernels import GroupPlan, extension
from atp_kernels.groups import definition, native

pytestmark = pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))

# A tile has 16384 elements, a block of groups 1024, a run of a sum 128.
SIZES = ((1500, 40, 0), (40, 1500, 1), (300, 203, 1), (7, 9, 0))
UNITS = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
WEIGHT = torch.tensor(-1.7)


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def joint(dtype):
    return problem(11, SIZES, 2500, dtype)


def separate(dtype):
    factors, _, _ = joint(dtype)
    counts = [size[size[2]] for size in SIZES]
    n = sum(counts)
    groups = [(size[2], ids) for size, ids in zip(SIZES, torch.arange(n).split(counts), strict=True)]
    return factors, GroupPlan.of(factors, groups, n), torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.4


def runs(dtype):
    """Groups of seven slots, which no tile is a multiple of, and every slot of two factors its own."""
    factors, _, _ = joint(dtype)
    groups, start = [], 0
    for i, size in enumerate(SIZES):
        index = start + torch.arange(size[size[2]]) // (7 if i < 2 else 1)
        groups.append((size[2], index))
        start = int(index[-1]) + 1
    plan = GroupPlan.of(factors, groups, start)
    assert plan.runs and not plan.separate
    return factors, plan, torch.rand(start, generator=torch.Generator().manual_seed(3)) < 0.4


def long_runs(dtype):
    """A group of more slots than a tile may have."""
    factor = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = (torch.arange(50_000) - 29_000).clamp_min(0) // 500
    plan = GroupPlan.of([factor], [(0, index)], int(index[-1]) + 1)
    assert plan.runs
    return [factor], plan, torch.arange(plan.n_groups) % 3 == 0


def assert_all_close(got, wanted, dtype):
    for value, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(value.double(), want, rtol=UNITS[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joint_lasso_and_its_gradient(dtype):
    factors, plan, removed = joint(dtype)
    value, norms, grads = exact(factors, plan, removed)
    got, got_norms = native.group_lasso_forward(factors, plan, removed, EPS)
    assert_all_close([got, got_norms], [value, norms], torch.float32)
    assert_all_close(native.group_lasso_backward(factors, plan, removed, got_norms, torch.ones(())), grads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [joint, separate, runs, long_runs])
def test_direct_gradient(make, dtype):
    factors, plan, removed = make(dtype)
    value, _, grads = exact(factors, plan, removed)
    sums = [factor.flip(0) for factor in factors]
    wanted = [total.double() + WEIGHT.double() * grad for total, grad in zip(sums, grads, strict=True)]
    got = native.group_lasso_grad_(factors, sums, plan, removed, WEIGHT, EPS)
    assert_all_close([got], [value], torch.float32)
    assert_all_close(sums, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_separate_lasso_and_its_gradient(dtype):
    factors, plan, removed = separate(dtype)
    value, _, grads = exact(factors, plan, removed)
    got, direction = native.separate_lasso_forward(factors, plan, removed, EPS, True)
    assert_all_close([got], [value], torch.float32)
    wanted = [WEIGHT.double() * grad for grad in grads]
    for in_place in (False, True):
        parts = native.separate_lasso_backward(direction, plan, WEIGHT, in_place)
        assert_all_close(parts, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prox(dtype):
    factors, plan, removed = joint(dtype)
    threshold = torch.linspace(0, 9, removed.numel())
    wide = [factor.double() for factor in factors]
    definition.group_prox_(wide, plan.groups, removed, threshold.double())
    native.group_prox_(factors, plan, removed, threshold)
    assert_all_close(factors, wide, dtype)


def test_a_long_sum_keeps_its_digits():
    """Equal squares: one float32 sum of so many is off by far more than sums of runs."""
    factor = torch.full((200_000, 41), 0.1)
    plan = GroupPlan.of([factor], [(1, torch.arange(41))], 41)
    norms = native.group_lasso_forward([factor], plan, torch.ones(41, dtype=torch.bool), 0.0)[1]
    expected = (factor[0].double().square() * len(factor)).sqrt()
    torch.testing.assert_close(norms.double(), expected, rtol=2e-5, atol=0)
