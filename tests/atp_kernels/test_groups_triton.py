"""Group lasso and its proximal step in Triton: natively on a GPU, else in Triton's interpreter."""

import pytest
import torch
from backends_here import DEVICE, ON_GPU, new_memory_is_nan
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_kernels import GroupPlan, group_lasso, group_lasso_grad_, group_prox_, triton_runtime

if not triton_runtime.AVAILABLE:
    pytest.skip(triton_runtime.REASON, allow_module_level=True)

from atp_kernels.groups import triton as backend
from atp_kernels.groups import triton_kernels as kernels

TRITON = {"backend": "triton"}
HALVES = (torch.float16, torch.bfloat16)
# The interpreter cuts a float32 off to bfloat16 where a GPU rounds it.
FACTOR = {torch.float32: 2.0, torch.float16: 2.0, torch.bfloat16: 2.0 if ON_GPU else 3.0}
# Several tiles of slots, several steps along a slot, wide and narrow accesses, single rows and nothing at all.
SHAPES = (((300, 3), 0), ((4, 70), 1), ((70, 5), 1), ((3, 150), 0), ((8, 40), 1), ((1, 9), 0), ((0, 4), 0), ((6, 0), 0))
N_GROUPS = 21
FENCE = 2**14


def problem(*dtypes, shapes=SHAPES, n_groups=N_GROUPS, joint=True, seed=0):
    """Factors whose dtypes take turns; the last group owns nothing. joint: many slots share an id, else none do."""
    rng = torch.Generator().manual_seed(seed)
    factors, groups, start = [], [], 0
    for i, (shape, axis) in enumerate(shapes):
        factors.append(torch.randn(shape, generator=rng).to(DEVICE, dtypes[i % len(dtypes)]).requires_grad_())
        size = shape[axis]
        index = torch.randint(n_groups - 1, (size,), generator=rng) if joint else torch.arange(start, start + size)
        groups.append((axis, index.to(DEVICE)))
        start += size
    removed = torch.rand(n_groups if joint else start + 1, generator=rng) < 0.6
    return factors, groups, removed.to(DEVICE)


def lasso_and_gradients(factors, groups, removed, **options):
    value = group_lasso(factors, groups, removed, **options)
    return value, *torch.autograd.grad(-1.5 * value, factors)


def direct(factors, groups, removed, **options):
    """Value and gradients of the call that adds to what is there: half of every factor, so that no sum cancels."""
    leaves = [factor.detach().requires_grad_() for factor in factors]
    for leaf in leaves:
        leaf.grad = leaf.detach() / 2
    value = group_lasso_grad_(leaves, groups, removed, weight=1.5, **options)
    return value, *(leaf.grad for leaf in leaves)


def after_prox(factors, groups, removed, threshold, **options):
    shrunk = [factor.detach().clone() for factor in factors]
    group_prox_(shrunk, groups, removed, threshold, **options)
    return shrunk


def both(factors, groups, removed):
    return (
        *lasso_and_gradients(factors, groups, removed, **TRITON),
        *direct(factors, groups, removed, **TRITON),
        *after_prox(factors, groups, removed, 2.0, **TRITON),
    )


def assert_as_good_as_unfused(got, exact, plain):
    """Errors against float64 at most those of unfused PyTorch times FACTOR; one rounding is allowed in any case."""
    for value, true, unfused in zip(got, exact, plain, strict=True):
        assert value.dtype == unfused.dtype and value.shape == unfused.shape
        error, other = ((some.double() - true).norm().item() for some in (value, unfused))
        rounding = torch.finfo(value.dtype).eps * true.norm().item()
        assert error <= max(FACTOR[value.dtype] * other, rounding)


def check(factors, groups, removed):
    wide = [factor.detach().double().requires_grad_() for factor in factors]
    threshold = 0.5 + 3 * torch.arange(len(removed), device=DEVICE) / len(removed)
    for run, options in ((lasso_and_gradients, ()), (direct, ()), (after_prox, (threshold,))):
        got, plain = (run(factors, groups, removed, *options, backend=name) for name in ("triton", "reference"))
        assert_as_good_as_unfused(got, run(wide, groups, removed, *options, backend="reference"), plain)


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "one-a-slot"])
@pytest.mark.parametrize(
    "dtypes", [*((dtype,) for dtype in FACTOR), (torch.bfloat16, torch.float32, torch.float16)], ids=str
)
def test_error_is_no_worse_than_unfused(dtypes, joint):
    check(*problem(*dtypes, joint=joint))


@given(
    sizes=st.lists(st.tuples(st.sampled_from([0, 1, 5, 8, 64]), st.sampled_from([0, 1, 8, 16, 33]), st.integers(0, 1)),
                   min_size=1, max_size=4),
    n_groups=st.sampled_from([2, 5, 300]),
    dtypes=st.sampled_from([(torch.float32,), (torch.float16, torch.float32)]),
)  # fmt: skip
@settings(max_examples=25, derandomize=True, deadline=None)
def test_any_shape(sizes, n_groups, dtypes):
    check(*problem(*dtypes, shapes=[(size[:2], size[2]) for size in sizes], n_groups=n_groups))


def test_kept_groups_get_zeros_and_stay_untouched():
    factors, groups, removed = problem(torch.float32, *HALVES)
    factors[0].data[removed.logical_not()[groups[0][1]].nonzero()[0]] = torch.inf  # its group is kept, so nobody minds
    _, *grads = lasso_and_gradients(factors, groups, removed, **TRITON)
    _, *sums = direct(factors, groups, removed, **TRITON)
    shrunk = after_prox(factors, groups, removed, 0.1, **TRITON)
    for factor, grad, total, new, (axis, index) in zip(factors, grads, sums, shrunk, groups, strict=True):
        kept = ~removed[index]
        along = kept.nonzero().flatten()
        assert (grad.index_select(axis, along) == 0).all()
        assert torch.equal(total.index_select(axis, along), factor.detach().index_select(axis, along) / 2)
        assert torch.equal(new.index_select(axis, along), factor.index_select(axis, along))
        rest = removed[index].nonzero().flatten()
        assert (grad.index_select(axis, rest) != 0).all()


def test_prox_reaches_exact_zeros():
    factors, groups, removed = problem(torch.float32, *HALVES)
    removed[:] = True
    for threshold in (1e6, 1.0):  # the second one meets groups that are zero already
        group_prox_(factors, groups, removed, threshold, **TRITON)
        assert all((factor == 0).all() for factor in factors)
    _, *grads = lasso_and_gradients(factors, groups, removed, eps=0.0, **TRITON)
    assert all((grad == 0).all() for grad in grads)


def test_nothing_is_read_or_written_outside_the_operands_or_before_it_is_written():
    operands = factors, groups, removed = problem(torch.float32, *HALVES)

    def fenced(tensor, fence):
        """The same values, contiguous, inside a buffer of `fence` so wide that no tile passes it."""
        buffer = torch.full((tensor.numel() + 2 * FENCE,), fence, dtype=tensor.dtype, device=DEVICE)
        inside = buffer[FENCE : FENCE + tensor.numel()].view(tensor.shape)
        return buffer, inside.copy_(tensor.detach())

    buffers, inside = zip(*(fenced(factor, torch.nan) for factor in factors), strict=True)
    groups = [(axis, fenced(index, 0)[1]) for axis, index in groups]
    removed = fenced(removed, True)[1]
    with new_memory_is_nan():
        leaves = [factor.detach().requires_grad_() for factor in inside]
        assert group_lasso(leaves, groups, removed, **TRITON).isfinite()
        got = lasso_and_gradients(leaves, groups, removed, **TRITON)
        for leaf in leaves:
            leaf.grad = fenced(leaf.detach() / 2, torch.nan)[1]
        value = group_lasso_grad_(leaves, groups, removed, weight=1.5, **TRITON)
        got += value, *(leaf.grad for leaf in leaves)
        group_prox_(inside, groups, removed, 2.0, **TRITON)
    for buffer in buffers:
        assert buffer[:FENCE].isnan().all() and buffer[-FENCE:].isnan().all()
    for value, other in zip((*got, *inside), both(*operands), strict=True):
        assert torch.equal(value, other)


def test_bitwise_deterministic():
    factors, groups, removed = problem(torch.float32, *HALVES, shapes=SHAPES[:2])
    first = both(factors, groups, removed)
    for _ in range(9 if ON_GPU else 1):
        again = both(factors, groups, removed)
        assert all(torch.equal(value, other) for value, other in zip(again, first, strict=True))


def test_parts_beyond_one_block_are_added_up():
    parts = torch.arange(10, dtype=torch.float64, device=DEVICE)
    value = parts.new_empty((), dtype=torch.float32)
    kernels.total_kernel[(1,)](parts, value, 10, BLOCK=4)
    assert value == 45


def test_wide_accesses_are_promised_only_where_every_row_starts_on_16_bytes():
    """A broken promise is a misaligned address on a GPU, which the interpreter would not notice."""
    storage = torch.zeros(200, dtype=torch.bfloat16, device=DEVICE)
    index = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for start, cols, aligned in ((0, 8, True), (8, 16, True), (0, 12, False), (4, 8, False)):
        factor = storage[start : start + 3 * cols].view(3, cols)
        factors = [torch.zeros(3, 8, device=DEVICE), factor]
        plan = GroupPlan.of(factors, [(0, index), (0, index)], 1)
        assert backend._walk(factors, factors, plan)[2]["ALIGNED"] is aligned
        assert backend._walk(factors[:1] * 2, factors, plan)[2]["ALIGNED"] is (aligned or cols == 12)


def test_a_tensor_whose_storage_moves_is_met_at_its_new_address():
    factors, groups, removed = problem(torch.float32)
    before = group_lasso(factors, groups, removed, **TRITON)
    for factor in factors:
        factor.data = 2 * factor.data
    torch.testing.assert_close(group_lasso(factors, groups, removed, eps=0.0, **TRITON), 2 * before)


def test_prox_tells_autograd_and_a_gradient_has_the_dtype_of_its_factor():
    factors, groups, removed = problem(torch.float32)
    value = group_lasso(factors, groups, removed, **TRITON)
    group_prox_(factors, groups, removed, 0.5, **TRITON)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    plan, held = GroupPlan.of(factors, groups, len(removed)), [factor.detach() for factor in factors]
    with pytest.raises(RuntimeError, match="not of the dtype of its factor"):
        backend.group_lasso_grad_(held, [grad.half() for grad in held], plan, removed, removed.float()[0], 1e-8)
