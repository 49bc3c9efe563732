"""`group_lasso_grad_`: the gradient of the group lasso added to `.grad` without autograd, held to autograd's."""

import pytest
import torch
from backends_here import DEVICE, takes
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_kernels import GroupPlan, extension, group_lasso, group_lasso_grad_
from atp_kernels.groups import definition, native

BACKENDS = [name for name in ("reference", "native") if takes("group_lasso_grad_", torch.float32, name)]
DTYPES = (torch.float32, torch.bfloat16)
SIZES = ((13, 8, 0), (8, 37, 1), (5, 3, 0), (300, 2, 1))
WEIGHT = 0.3
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason=str(extension.REASON))
every_backend = pytest.mark.parametrize("backend", BACKENDS)
KINDS = ("joint", "separate", "runs")
every_kind = pytest.mark.parametrize("kind", KINDS)


def problem(sizes=SIZES, dtype=torch.float32, kind="joint", strided=False, seed=0):
    """Factors, their groups and which are removed. joint: any slots share one; runs: neighbours do, in some factors."""
    rng = torch.Generator().manual_seed(seed)
    factors, groups, start = [], [], 0
    for i, (rows, cols, axis) in enumerate(sizes):
        factors.append(drawn(rng, rows, cols, dtype, strided).requires_grad_())
        size = (rows, cols)[axis]
        begins = torch.ones(size, dtype=torch.bool)
        if kind == "runs" and i % 2:
            begins[1:] = torch.rand(max(0, size - 1), generator=rng) < 0.3
        index = torch.randint(7, (size,), generator=rng) if kind == "joint" else start - 1 + begins.cumsum(0)
        groups.append((axis, index.to(DEVICE)))
        start += int(begins.sum())
    return factors, groups, (torch.rand(9 if kind == "joint" else start, generator=rng) < 0.5).to(DEVICE)


def drawn(rng, rows, cols, dtype, strided):
    values = torch.randn((rows, 2 * cols) if strided else (rows, cols), generator=rng).to(DEVICE, dtype)
    return values[:, ::2] if strided else values


def with_grads(factors, seed=1, strided=False):
    """The same factors with gradients that are there already."""
    rng = torch.Generator().manual_seed(seed)
    for factor in factors:
        factor.grad = drawn(rng, *factor.shape, factor.dtype, strided)
    return factors


def direct(factors, *described, weight=WEIGHT, **options):
    """The value, and all gradients after the direct call."""
    value = group_lasso_grad_(factors, *described, weight=weight, **options)
    return value, *(factor.grad for factor in factors)


def through_autograd(factors, *described, lasso=group_lasso, weight=WEIGHT, **options):
    """The value, and all gradients after the backward pass."""
    value = lasso(factors, *described, **options)
    (weight * value).backward()
    return value.detach(), *(factor.grad for factor in factors)


def assert_as_good_as_unfused(case, backend):
    """Errors of value and sums against float64 at most twice those of plain PyTorch; one rounding is always allowed."""
    factors, groups, removed = case
    wide, plain = ([f.detach().clone().to(d).requires_grad_() for f in factors] for d in (torch.float64, None))
    for copies in (wide, plain):
        for copy, factor in zip(copies, factors, strict=True):
            copy.grad = None if factor.grad is None else factor.grad.to(copy.dtype).contiguous()
    exact, unfused = (through_autograd(f, groups, removed, lasso=definition.group_lasso) for f in (wide, plain))
    for got, other, true in zip(direct(*case, backend=backend), unfused, exact, strict=True):
        assert got.dtype == other.dtype and got.shape == other.shape
        error, allowed = ((result.double() - true).norm() for result in (got, other))
        assert error <= max(2 * allowed, torch.finfo(got.dtype).eps * true.norm())


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("there", [True, False], ids=["existing", "none"])
def test_error_is_no_worse_than_unfused(backend, kind, dtype, there):
    factors, *described = problem(dtype=dtype, kind=kind)
    assert_as_good_as_unfused((with_grads(factors) if there else factors, *described), backend)


cases = st.builds(
    problem,
    sizes=st.lists(
        st.tuples(st.integers(0, 70), st.sampled_from([1, 3, 8, 16, 29, 64]), st.sampled_from([0, 1])),
        min_size=1,
        max_size=5,
    ),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)


@given(cases, st.sampled_from(BACKENDS), st.sampled_from([None, True, False]))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_any_shape_and_stride(case, backend, strided_grads):
    factors, *described = case
    if strided_grads is not None:
        with_grads(factors, strided=strided_grads)
    assert_as_good_as_unfused((factors, *described), backend)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@every_kind
def test_it_is_what_autograd_gives(backend, kind):
    for weight in (WEIGHT, torch.tensor(WEIGHT, device=DEVICE), torch.tensor(-2.5, dtype=torch.float64, device=DEVICE)):
        (factors, *described), (others, *_) = (problem(kind=kind) for _ in range(2))
        for _ in range(2):  # the first time there is no gradient, the second time there is
            got = direct(factors, *described, weight=weight, eps=0.5, backend=backend)
            expected = through_autograd(others, *described, weight=weight, eps=0.5, backend=backend)
            assert not got[0].requires_grad
            for value, other in zip(got, expected, strict=True):
                torch.testing.assert_close(value, other)


def test_float64_and_mixed_dtypes():
    factors, *described = problem()
    for dtypes in ((torch.float64,), (torch.bfloat16, torch.float32), (torch.float64, torch.float16)):
        mixed = [f.detach().to(dtypes[i % len(dtypes)]).requires_grad_() for i, f in enumerate(factors)]
        others = [factor.detach().clone().requires_grad_() for factor in mixed]
        expected = through_autograd(others, *described)
        for value, other in zip(direct(mixed, *described), expected, strict=True):
            assert value.dtype == other.dtype
            torch.testing.assert_close(value, other)


@every_backend
@every_kind
def test_what_is_kept_gets_exactly_nothing(backend, kind):
    factors, groups, removed = problem(kind=kind)
    removed[groups[0][1][0]] = False
    if backend == "native":
        with torch.no_grad():
            factors[0][0] = torch.nan  # its group is kept, so nobody minds
    before = [factor.grad.clone() for factor in with_grads(factors)]
    group_lasso_grad_(factors, groups, removed, weight=WEIGHT, backend=backend)
    for factor, old, (axis, index) in zip(factors, before, groups, strict=True):
        kept, rest = ((~removed)[index], removed[index])
        assert torch.equal(*(grad.index_select(axis, kept.nonzero().flatten()) for grad in (factor.grad, old)))
        assert not torch.equal(*(grad.index_select(axis, rest.nonzero().flatten()) for grad in (factor.grad, old)))


@every_backend
@every_kind
def test_bitwise_equal_over_runs_and_over_plan_and_list(backend, kind):
    factors, groups, removed = problem(kind=kind)
    plan = GroupPlan.of(factors, groups, len(removed))
    first = [result.clone() for result in direct(with_grads(factors), groups, removed, backend=backend)]
    for run in range(10):
        again = direct(with_grads(factors), plan if run % 2 else groups, removed, backend=backend)
        assert all(map(torch.equal, again, first))


@every_backend
def test_frozen_factors_count_and_get_nothing(backend):
    factors, *described = problem()
    expected = group_lasso(factors, *described)
    factors[1].requires_grad_(False)
    with_grads(factors[2:3])
    factors[2].requires_grad_(False)
    before = factors[2].grad.clone()
    torch.testing.assert_close(group_lasso_grad_(factors, *described, backend=backend), expected.detach())
    assert factors[1].grad is None and torch.equal(factors[2].grad, before)
    assert factors[0].grad.any() and factors[3].grad.any()
    before = [factor.grad.clone() for factor in with_grads(factors)]  # now all have one
    group_lasso_grad_(factors, *described, backend=backend)
    changed = [not torch.equal(factor.grad, old) for factor, old in zip(factors, before, strict=True)]
    assert changed == [True, False, False, True]


@every_backend
def test_gradients_keep_their_memory_and_strides_and_say_that_they_changed(backend):
    factors, *described = problem()
    whole = torch.zeros(13, 16, device=DEVICE)
    factors[0].grad = whole[:, ::2]
    grads = [factors[0].grad, with_grads(factors[1:2])[0].grad]
    versions = [grad._version for grad in grads]
    group_lasso_grad_(factors, *described, backend=backend)
    assert factors[0].grad is grads[0] and factors[1].grad is grads[1]
    assert whole[:, ::2].any() and not whole[:, 1::2].any()
    assert all(grad._version > version for grad, version in zip(grads, versions, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_wrong_calls_are_one_clear_sentence():
    factors, groups, removed = problem()
    plan = GroupPlan.of(factors, groups, len(removed))
    for weight in (torch.ones(2, device=DEVICE), torch.tensor(1, device=DEVICE), torch.ones((), device="meta")):
        with pytest.raises(ValueError, match=f"weight is torch.*: give a number or a floating 0-d tensor on {DEVICE}"):
            group_lasso_grad_(factors, groups, removed, weight=weight)
    with pytest.raises(ValueError, match="neither a leaf nor retains its gradient: give parameters"):
        group_lasso_grad_([2 * factor for factor in factors], groups, removed)
    narrow, low = factors[0].detach()[:, :5].requires_grad_(), factors[1].detach()[:5].requires_grad_()
    for backend in BACKENDS:
        for changed in (factors[:2], [narrow, *factors[1:]], [factors[0], low, *factors[2:]]):
            with pytest.raises(ValueError, match="made for 4 factors of other shapes"):
                group_lasso_grad_(changed, plan, removed, backend=backend)
    with pytest.raises(ValueError, match="removed must be a 1-D bool"):
        group_lasso_grad_(factors, groups, removed.float())


@needs_native
def test_native_refuses_what_does_not_fit():
    factors, groups, removed = problem()
    plan = GroupPlan.of(factors, groups, len(removed))
    with pytest.raises(RuntimeError, match="appears twice"):
        group_lasso_grad_([factors[0]] * 2, [groups[0]] * 2, removed)
    held, one = [factor.detach() for factor in factors], torch.ones((), device=DEVICE)
    for grads, weight, message in (
        ([*held[:-1], held[-1].bfloat16()], one, "gradient of factor 3 must"),
        ([held[0][:-1], *held[1:]], one, "gradient of factor 0 must"),
        (held[:-1], one, "got 4 factors and 3 gradients"),
        ([grad.clone() for grad in held], torch.ones(2, device=DEVICE), "weight must be one float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.group_lasso_grad_(held, grads, plan, removed, weight, 1e-8)
