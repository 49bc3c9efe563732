"""Group lasso, its gradient added in place and its proximal step on every backend, against float64.

Triton runs natively on a GPU, else in its interpreter.
"""

import pytest
import torch
from backends_here import DEVICE, ON_GPU, backends, new_memory_is_nan, takes
from group_cases import KINDS, SIZES, copies, outcome, problem, with_grads
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_kernels import GroupPlan, group_lasso, group_prox_

BACKENDS = backends("group_lasso")
HALVES = (torch.float16, torch.bfloat16)
# The interpreter cuts a float32 off to bfloat16 where a GPU rounds it.
FACTOR = {"native": 2.0, "reference": 2.0, "triton": 2.0 if ON_GPU else 3.0}
FENCE = 2**14
MIXED = ((torch.bfloat16, torch.float32, torch.float16), (torch.float64, torch.float16))
CALLS = [
    (name, dtypes)
    for dtypes in ((torch.float32,), (torch.bfloat16,), (torch.float16,), (torch.float64,), *MIXED)
    for name in BACKENDS
    if all(takes("group_lasso", dtype, name) for dtype in dtypes)
]
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason="needs the extension")
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")


def check(factors, groups, removed, backend):
    """Errors are at most FACTOR times those of plain PyTorch and one rounding; what is kept stays or gets zeros."""
    exact, plain = (outcome(copies(factors, dtype), groups, removed) for dtype in (torch.float64, None))
    before = copies(factors)
    got = outcome(factors, groups, removed, backend)
    for results in zip(got, exact, plain, strict=True):
        for value, true, other in zip(*results, strict=True):
            assert value.dtype == other.dtype and value.shape == other.shape
            error, own = ((some.double() - true).norm() for some in (value, other))
            factor = FACTOR[backend] if value.dtype == torch.bfloat16 else 2.0
            assert error <= factor * own + torch.finfo(value.dtype).eps * true.norm()
    (_, *grads), (_, *sums), shrunk = got
    for grad, total, new, old, (axis, index) in zip(grads, sums, shrunk, before, groups, strict=True):
        kept, rest = ((removed == flag)[index].nonzero().flatten() for flag in (False, True))
        there = torch.zeros_like(old) if old.grad is None else old.grad
        assert not grad.index_select(axis, kept).any() and (grad.index_select(axis, rest) != 0).all()
        assert torch.equal(total.index_select(axis, kept), there.index_select(axis, kept))
        assert torch.equal(new.index_select(axis, kept), old.index_select(axis, kept))


@pytest.mark.parametrize("grads", [None, False, True], ids=["no gradients", "gradients", "strided gradients"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtypes"), CALLS, ids=str)
def test_error_is_no_worse_than_unfused(backend, dtypes, kind, grads):
    factors, *described = problem(dtypes=dtypes, kind=kind)
    if grads is not None:
        with_grads(factors, strided=grads)
    check(factors, *described, backend)


cases = st.builds(
    problem,
    sizes=st.lists(
        st.tuples(st.sampled_from([0, 1, 5, 8, 64, 70]), st.sampled_from([1, 3, 8, 16, 29, 64]), st.integers(0, 1)),
        min_size=1,
        max_size=5,
    ),
    dtypes=st.sampled_from([(torch.float32,), (torch.bfloat16,)]),
    kind=st.sampled_from(KINDS),
    strided=st.booleans(),
    n_groups=st.sampled_from([2, 5, 300]),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("backend", BACKENDS)
@given(cases, st.sampled_from([None, True, False]))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_any_shape_and_stride(backend, case, grads):
    factors, *described = case
    if grads is not None:
        with_grads(factors, strided=grads)
    check(factors, *described, backend)


@needs_native
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "a long run"])
def test_many_tiles_of_native_code(kind, dtype):
    """A tile has 16384 elements, a block of groups 1024, a run of a sum 128, and a run more slots than a tile may."""
    if kind == "a long run":
        (factor,), *_ = problem([(50_000, 2, 0)], (dtype,))
        index = (torch.arange(50_000, device=DEVICE) - 29_000).clamp_min(0) // 500
        check([factor], [(0, index)], torch.arange(43, device=DEVICE) % 3 == 0, "native")
    else:
        sizes = ((1500, 40, 0), (40, 1500, 1), (300, 203, 1), (7, 9, 0))
        factors, *described = problem(sizes, (dtype,), kind, n_groups=2500)
        check(with_grads(factors), *described, "native")


@needs_native
def test_a_long_sum_keeps_its_digits():
    """Equal squares: one float32 sum of so many is off by far more than sums of runs."""
    factor = torch.full((200_000, 41), 0.1, device=DEVICE)
    groups, removed = [(1, torch.arange(41, device=DEVICE))], torch.ones(41, dtype=torch.bool, device=DEVICE)
    for joint in (0, 1):  # beside an empty group they are not separate
        flags = torch.cat([removed, removed[:joint]])
        value = group_lasso([factor], GroupPlan.of([factor], groups, len(flags)), flags, eps=0.0, backend="native")
        expected = (factor[0].double().square() * len(factor)).sqrt().sum()
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prox_reaches_exact_zeros(backend):
    factors, groups, removed = problem()
    removed[:] = True
    for threshold in (1e6, 1.0):  # the second one meets groups that are zero already
        group_prox_(factors, groups, removed, threshold, backend=backend)
        assert all((factor == 0).all() for factor in factors)
    grads = torch.autograd.grad(group_lasso(factors, groups, removed, eps=0.0, backend=backend), factors)
    assert all((grad == 0).all() for grad in grads)


@needs_triton
def test_nothing_is_read_or_written_outside_the_operands_or_before_it_is_written():
    factors, groups, removed = problem(dtypes=(torch.float32, *HALVES))
    with_grads(factors)
    expected = outcome(copies(factors), groups, removed, "triton")

    def fenced(tensor, fence=torch.nan):
        """The same values, contiguous, inside a buffer of `fence` so wide that no tile passes it."""
        buffer = torch.full((tensor.numel() + 2 * FENCE,), fence, dtype=tensor.dtype, device=DEVICE)
        buffers.append(buffer)
        return buffer[FENCE : FENCE + tensor.numel()].view(tensor.shape).copy_(tensor.detach())

    buffers = []
    leaves = [fenced(factor).requires_grad_() for factor in factors]
    for leaf, factor in zip(leaves, factors, strict=True):
        leaf.grad = fenced(factor.grad)
    floating = list(buffers)
    groups = [(axis, fenced(index, 0)) for axis, index in groups]
    with new_memory_is_nan():
        got = outcome(leaves, groups, fenced(removed, True), "triton")
    for buffer in floating:
        assert buffer[:FENCE].isnan().all() and buffer[-FENCE:].isnan().all()
    for values, others in zip(got, expected, strict=True):
        assert all(map(torch.equal, values, others))


@needs_triton
def test_parts_beyond_one_block_are_added_up():
    from atp_kernels.groups import triton_kernels as kernels

    parts = torch.arange(10, dtype=torch.float64, device=DEVICE)
    value = parts.new_empty((), dtype=torch.float32)
    kernels.total_kernel[(1,)](parts, value, 10, BLOCK=4)
    assert value == 45


@needs_triton
def test_wide_accesses_are_promised_only_where_every_row_starts_on_16_bytes():
    """A broken promise is a misaligned address on a GPU, which the interpreter would not notice."""
    from atp_kernels.groups import triton as backend

    storage = torch.zeros(200, dtype=torch.bfloat16, device=DEVICE)
    index = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for start, cols, aligned in ((0, 8, True), (8, 16, True), (0, 12, False), (4, 8, False)):
        factor = storage[start : start + 3 * cols].view(3, cols)
        factors = [torch.zeros(3, 8, device=DEVICE), factor]
        plan = GroupPlan.of(factors, [(0, index), (0, index)], 1)
        assert backend._walk(factors, factors, plan)[2]["ALIGNED"] is aligned
        assert backend._walk(factors[:1] * 2, factors, plan)[2]["ALIGNED"] is (aligned or cols == 12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_whose_storage_moves_is_met_at_its_new_address(backend):
    factors, groups, removed = problem()
    before = group_lasso(factors, groups, removed, backend=backend)
    for factor in factors:
        factor.data = 2 * factor.data
    torch.testing.assert_close(group_lasso(factors, groups, removed, eps=0.0, backend=backend), 2 * before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prox_tells_autograd(backend):
    factors, groups, removed = problem(SIZES[:2])
    value = group_lasso(factors, groups, removed, backend=backend)
    group_prox_(factors, groups, removed, 0.5, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@needs_triton
def test_a_gradient_has_the_dtype_of_its_factor():
    from atp_kernels.groups import triton as backend

    factors, groups, removed = problem(SIZES[:2])
    plan, held = GroupPlan.of(factors, groups, len(removed)), [factor.detach() for factor in factors]
    with pytest.raises(RuntimeError, match="not of the dtype of its factor"):
        backend.group_lasso_grad_(held, [grad.half() for grad in held], plan, removed, removed.float()[0], 1e-8)
