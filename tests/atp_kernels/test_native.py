"""The native backend against float64 formulas and against the reference backend."""

import importlib

import pytest
import torch
from group_cases import planned, plans
from hypothesis import given, settings
from hypothesis import strategies as st
from repeats import assert_repeats, assert_same_on_every_isa, run_with_isa

from atp_kernels import GroupPlan, extension
from atp_kernels.compaction import definition as compaction
from atp_kernels.compaction.native import compact
from atp_kernels.dropout.definition import Dropout
from atp_kernels.groups import native
from atp_kernels.linear import native as columns_of

pytestmark = pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))

EPS = 1e-8
DTYPES = [torch.float32, torch.bfloat16]
common = settings(max_examples=40, derandomize=True, deadline=None)


def detached(case):
    factors, *described = case
    return [factor.detach() for factor in factors], *described


problems = plans("joint").map(detached)


@common
@given(problems, st.floats(-3, 3, width=32))
def test_gradient_is_linear_in_grad_out_and_zero_off_removed_groups(case, upstream):
    factors, plan, removed = case
    _, norms = native.group_lasso_forward(factors, plan, removed, EPS)
    grads = native.group_lasso_backward(factors, plan, removed, norms, torch.tensor(upstream))
    for factor, (axis, index), grad in zip(factors, plan.groups, grads, strict=True):
        slope = torch.where(removed, torch.tensor(upstream) / norms, 0)[index].unsqueeze(1 - axis)
        assert torch.equal(grad, (factor.float() * slope).to(factor.dtype))
        assert not grad.index_select(axis, (~removed[index]).nonzero().flatten()).any()


@common
@given(problems, st.floats(-3, 3, width=32), st.booleans())
def test_direct_gradient_is_added_with_one_rounding(case, weight, separate):
    factors, plan, removed = case
    if separate:
        slots = plan.index.numel()
        plan = GroupPlan.of(factors, [(a, s.long()) for a, s in own_slots(plan)], slots)
        removed = removed.repeat(slots)[:slots]
    joint, norms = native.group_lasso_forward(factors, plan, removed, EPS)
    before = [factor.flip(0) for factor in factors]
    grads = [grad.clone() for grad in before]
    value = native.group_lasso_grad_(factors, grads, plan, removed, torch.tensor(weight), EPS)
    torch.testing.assert_close(value, joint, rtol=2**-23, atol=0)
    slopes = torch.where(removed, torch.tensor(weight) / norms, 0)
    for factor, old, grad, (axis, index) in zip(factors, before, grads, plan.groups, strict=True):
        part = factor.float() * slopes[index].unsqueeze(1 - axis)
        assert torch.equal(grad, (old.float() + part).to(factor.dtype))


def own_slots(plan):
    """The axes of a plan with an id of its own for every slot."""
    ids = torch.arange(plan.index.numel())
    return list(zip(plan.axes, ids.split([index.numel() for _, index in plan.groups]), strict=True))


def test_a_zero_group_stays_zero_without_eps_and_threshold():
    factor, removed = torch.zeros(2, 3), torch.ones(2, dtype=torch.bool)
    plan = GroupPlan.of([factor], [(0, torch.arange(2))], 2)
    _, norms = native.group_lasso_forward([factor], plan, removed, 0.0)
    assert not native.group_lasso_backward([factor], plan, removed, norms, torch.ones(()))[0].any()
    native.group_prox_([factor], plan, removed, torch.zeros(2))
    assert torch.equal(factor, torch.zeros(2, 3))


index_of = st.one_of(st.none(), st.lists(st.integers(0, 36), max_size=80))


@common
@given(
    index_of,
    index_of,
    st.sampled_from([1, 8, 64]),
    st.sampled_from([*DTYPES, torch.float64, torch.int8]),
    st.booleans(),
)
def test_compact_is_an_exact_gather(rows, cols, pad_to, dtype, transposed):
    weight = torch.arange(37 * 37).remainder(101).view(37, 37).to(dtype)
    weight = weight.t() if transposed else weight
    rows, cols = (index if index is None else torch.tensor(index, dtype=torch.int64) for index in (rows, cols))
    got = compact(weight, rows, cols, pad_to)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, compaction.compact(weight, rows, cols, pad_to))


def large_problem(dtype):
    sizes = [(1536, 8, 0), (8, 1536, 1), (576, 64, 0), (300, 577, 1)] * 3
    return detached(planned("joint", sizes, dtype, n_groups=1700))


def everything(case):
    factors, plan, removed = case
    value, norms = native.group_lasso_forward(factors, plan, removed, EPS)
    grads = native.group_lasso_backward(factors, plan, removed, norms, torch.ones(()))
    shrunk = [factor.clone() for factor in factors]
    native.group_prox_(shrunk, plan, removed, torch.full(removed.shape, 0.7))
    kept = torch.arange(0, 1536, 3)
    compacted = [
        compact(factors[0], kept, None, 64),
        compact(factors[1], None, kept, 64),
    ]
    grad, total, mask = factors[3], factors[7], torch.linspace(0, 1, 577)
    columns = [*columns_of.mask_and_dot(grad, total, mask), columns_of.masked(grad, mask)]
    columns.append(columns_of.dropped(grad, Dropout(0.3, 5)))
    slots = plan.index.numel()
    ids = torch.arange(slots + 1, dtype=torch.int32)
    one_each = GroupPlan(plan.axes, plan.shapes, ids[:-1], ids[:-1], ids, runs=True)
    chosen = removed.repeat(-(-slots // len(removed)))[:slots]
    sizes = [factor.shape[axis] for factor, axis in zip(factors, plan.axes, strict=True)]
    index = torch.cat([torch.arange(size) // 5 + 4096 * i for i, size in enumerate(sizes)]).unique(return_inverse=True)[
        1
    ]
    fives = GroupPlan.of(factors, list(zip(plan.axes, index.split(sizes), strict=True)), int(index[-1]) + 1)
    separate = native.separate_lasso_forward(factors, one_each, chosen, EPS, True)
    separate += tuple(native.separate_lasso_backward(separate[1], one_each, torch.tensor(0.7), False))
    sums = []
    for described, flags in ((plan, removed), (one_each, chosen), (fives, chosen[: fives.n_groups])):
        totals = [factor.clone() for factor in factors]
        sums += native.group_lasso_grad_(factors, totals, described, flags, torch.tensor(0.3), EPS), *totals
    # What lies between the pieces of the direction is nobody's.
    return [value, norms, *grads, *shrunk, *compacted, *columns, separate[0], *separate[2:], *sums]


ENTROPY = "(t.problem(60, vocab, dtype, device='cpu') for dtype in t.DTYPES for vocab in (5003, 4128, 37))"
EVERYTHING = {
    "test_native": "(x for dtype in t.DTYPES for x in t.everything(t.large_problem(dtype)))",
    "test_native_activations": "(x for dtype in t.DTYPES for x in t.computed(*t.large_problem(dtype)))",
    "test_rms_norm": "t.TestNative.everything()",
    "test_merged_weight": "[t.native.merged_weight(*t.large_problem(), 0.7)]",
    "test_cross_entropy_kernel": f"(x for case in {ENTROPY} for x in t.computed(*case, 'native'))",
}
"""Results of the native code of test modules, each of which is `t`."""


@pytest.mark.parametrize("module", EVERYTHING)
def test_bits_do_not_depend_on_the_run_or_the_threads(module):
    names = {"t": importlib.import_module(module)}
    assert_repeats(lambda: eval(EVERYTHING[module], names))


def test_bits_do_not_depend_on_the_instruction_set():
    assert_same_on_every_isa(EVERYTHING)


def test_unknown_isa_is_refused_with_its_name():
    said = run_with_isa("mmx", "from atp_kernels import extension; print(extension.REASON)").stdout
    assert "ATP_KERNELS_ISA='mmx'" in said


def hand_made(axis, index):
    """A plan that no `GroupPlan.of` has checked."""
    index = torch.tensor(index, dtype=torch.int32)
    return GroupPlan((axis,), (), index, index, torch.zeros(5, dtype=torch.int32))


@pytest.mark.parametrize(
    ("factor", "plan", "message"),
    [
        (torch.ones(3, 2), hand_made(1, [0, 1, 2]), "index must be .* length 2"),
        (torch.ones(3, 2), hand_made(2, [0, 1, 2]), "axis of factor 0 is 2"),
        (torch.ones(3, 2, dtype=torch.float16), hand_made(0, [0, 1, 2]), "float32 or bfloat16"),
        (torch.ones(3), hand_made(0, [0, 1, 2]), "2-D"),
    ],
)
def test_wrong_input_is_one_sentence(factor, plan, message):
    with pytest.raises(RuntimeError, match=message):
        native.group_lasso_forward([factor], plan, torch.ones(4, dtype=torch.bool), EPS)


def test_prox_refuses_a_factor_given_twice():
    factors = [torch.ones(3, 2)] * 2
    plan = GroupPlan.of(factors, [(0, torch.arange(3))] * 2, 3)
    with pytest.raises(RuntimeError, match="appears twice"):
        native.group_prox_(factors, plan, torch.ones(3, dtype=torch.bool), torch.ones(3))


@pytest.mark.parametrize(("rows", "cols"), [([5], None), (None, [-1]), ([-1], None), (None, [4])])
def test_compact_refuses_an_index_out_of_range(rows, cols):
    rows, cols = (index if index is None else torch.tensor(index) for index in (rows, cols))
    with pytest.raises(RuntimeError, match=r"outside \[0, [45]\)"):
        compact(torch.ones(5, 4), rows, cols, 1)


def test_build_info_names_what_was_built():
    info = extension.build_info()
    assert info["isa"] in info["isa_compiled"] and info["stable_abi_target"] == "2.10"
    assert {"compiler", "cuda_archs", "torch_built_with"} < info.keys()


# Operands that are not what they say: nothing beyond them is touched

ops = torch.ops.atp_kernels_native


@pytest.mark.parametrize("pad_to", [2**62, 2**63 - 1])
def test_padding_beyond_all_memory_is_refused(pad_to):
    """A size that wraps around would be an allocation too small for what is copied into it."""
    with pytest.raises(RuntimeError):
        ops.compact(torch.randn(4, 8), None, torch.arange(8), pad_to)


def test_rows_without_columns_take_no_time():
    padded = ops.compact(torch.randn(4, 0), torch.arange(4), None, 2**50)
    assert padded.shape == (2**50, 0)


@pytest.mark.parametrize(
    "direction", [torch.zeros(64, dtype=torch.int8), torch.zeros(64, dtype=torch.float64), torch.zeros(128)[::2]],
    ids=["int8", "float64", "strided"],
)  # fmt: skip
def test_a_direction_in_other_elements_is_refused(direction):
    with pytest.raises(RuntimeError, match="direction must be"):
        ops.separate_lasso_backward(direction, [8, 8], torch.ones(()), False)


@pytest.mark.parametrize("sides", [[-1, -64], [2**62, 4], [65, 1], [2**63 - 1, 2**63 - 1]], ids=str)
def test_pieces_beyond_the_direction_are_refused(sides):
    with pytest.raises(RuntimeError, match="does not fit"):
        ops.separate_lasso_backward(torch.zeros(64), sides, torch.ones(()), False)


def test_rows_that_share_memory_are_not_written():
    """Two threads would write one row."""
    row, wide = torch.zeros(1, 8), torch.randn(4, 8)
    repeated, index = row.expand(4, 8), torch.arange(8)
    with pytest.raises(RuntimeError, match="out must have rows that share no memory"):
        ops.take_columns(wide, index, repeated)
    with pytest.raises(RuntimeError, match="values must have rows that share no memory"):
        ops.spread_columns_(repeated, 8, index)
    for place, name in ((3, "d_gate"), (4, "d_up")):
        operands = [wide, wide, wide, torch.zeros(4, 8), torch.zeros(4, 8)]
        operands[place] = repeated
        with pytest.raises(RuntimeError, match=f"{name} must have rows that share no memory"):
            ops.swiglu_backward(*operands)
    assert row.eq(0).all()
    ops.take_columns(repeated, index, torch.zeros(4, 8))  # they may be read


def test_an_empty_piece_has_any_other_side():
    (piece,) = ops.separate_lasso_backward(torch.zeros(0), [0, 1000], torch.ones(()), False)
    assert piece.shape == (0, 1000)
