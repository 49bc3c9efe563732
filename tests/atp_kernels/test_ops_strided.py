"""Operators of torch.library on strided operands: results as their fakes promise them to a compiler, or one refusal."""

import pytest
import torch
from backends_here import DEVICE, backends

import atp_kernels
from atp_kernels.compaction import op as compaction
from atp_kernels.dropout import op as dropout
from atp_kernels.groups import op as groups
from atp_kernels.kept import op as kept
from atp_kernels.linear import op as linear
from atp_kernels.loss import op as loss

REMOVED = torch.tensor([True, False, True, True], device=DEVICE)


def transposed(*shape):
    return torch.randn(tuple(reversed(shape)), device=DEVICE).permute(*reversed(range(len(shape))))


def spaced(*shape):
    return torch.randn([2 * size for size in shape], device=DEVICE)[(slice(None, None, 2),) * len(shape)]


def expanded(*shape):
    return torch.randn(*shape[:-1], 1, device=DEVICE).expand(shape)


def promised(op, *arguments):
    """The results have the shapes, dtypes and strides of the fake's, and the schema tells what is written."""
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("lay", [transposed, spaced, expanded])
@pytest.mark.parametrize("backend", backends("masked_lora_linear"))
@pytest.mark.parametrize("masked", [False, True])
def test_linear_and_dropout(lay, backend, masked):
    seed, x, grad, s = torch.tensor(3), lay(5, 7), lay(5, 6), lay(5, 2)
    factors = (lay(6, 7), lay(2, 7), lay(6, 2))
    masks = (lay(6).abs(), lay(7) > 0) if masked else (None, None)
    promised(dropout.lora_dropout_op, x, 0.5, seed, backend)
    for lora_input, drawn in ((lay(5, 7), (0.0, None)), (None, (0.5, seed))):
        options = (1.5, masked, masked, *drawn, backend)
        promised(linear.masked_lora_linear_op, x, *factors, lay(6), lora_input, *masks, *options)
        needs = [True, True, True, True, True, lora_input is not None, masked, False]
        options = (1.5, masked, lora_input is None, needs, *drawn, backend)
        promised(linear.masked_lora_linear_backward_op, grad, x, *factors, lora_input, *masks, s, lay(5, 6), *options)


@pytest.mark.parametrize("lay", [transposed, spaced, expanded])
@pytest.mark.parametrize("backend", backends("kept_lora_linear"))
@pytest.mark.parametrize("order", [lambda mask: mask, atp_kernels.KeptFirst])
def test_kept_linear(lay, backend, order):
    x, weight, lora_a, lora_b = lay(5, 7), lay(6, 7), lay(2, 7), lay(6, 2)
    masks = (order(torch.arange(6, device=DEVICE) % 3 == 0), order(torch.arange(7, device=DEVICE) % 2 == 0))
    slice_ = atp_kernels.KeptSlice(weight, lay(6), out_mask=masks[0], in_mask=masks[1], pad_to=2)
    parts, sides = (slice_.weight(x.dtype), slice_.bias(x.dtype)), kept.flat(slice_.sides)
    promised(kept.kept_lora_linear_op, x, *parts, lora_a, lora_b, None, *sides, 1.5, backend)
    options = (1.5, True, [True, True, True, False], backend)
    promised(kept.kept_lora_linear_backward_op, lay(5, 6), parts[0], lora_a, lora_b, x, lay(5, 2), *sides, *options)


@pytest.mark.parametrize("lay", [transposed, spaced])
@pytest.mark.parametrize("backend", backends("group_lasso"))
def test_groups(lay, backend):
    index = torch.tensor([0, 0, 1, 1, 2, 2], device=DEVICE)
    ones, one = torch.ones(4, device=DEVICE), torch.ones((), device=DEVICE)
    factors = [lay(6, 2), lay(3, 6)]
    plan = atp_kernels.GroupPlan.of(factors, [(0, index), (1, index)], 4)
    packed = (list(plan.axes), plan.index, plan.order, plan.starts)
    promised(groups.group_lasso_op, factors, *packed, REMOVED, 1e-8, backend)
    promised(groups.group_lasso_backward_op, factors, *packed, REMOVED, ones, one, backend)
    grads = [lay(6, 2), lay(3, 6)]
    promised(groups.group_lasso_grad_op, factors, grads, *packed, REMOVED, one, 1e-8, backend)
    promised(groups.group_prox_op, factors, *packed, REMOVED, ones, backend)


@pytest.mark.parametrize("lay", [transposed, spaced])
@pytest.mark.parametrize("backend", backends("compact"))
def test_compaction_and_cross_entropy(lay, backend):
    promised(compaction.compact_op, lay(5, 6), torch.tensor([1, 0, 4, 0], device=DEVICE)[::2], None, 4, backend)
    promised(loss.cross_entropy_op, lay(5, 6), torch.arange(10, device=DEVICE)[::2] % 6, backend)


def windows(rows, cols, down, across):
    """A matrix of these steps, in memory that ends with its last element."""
    size = (rows - 1) * down + (cols - 1) * across + 1
    return torch.randn(size, device=DEVICE).as_strided((rows, cols), (down, across))


@pytest.mark.parametrize(
    ("steps", "shared"),
    [((1, 1), True), ((2, 1), True), ((3, 1), False), ((1, 4), False), ((3, 2), False), ((4, 2), True), ((0, 1), True)],
    ids=str,
)
def test_in_place_operations_take_every_layout_whose_elements_have_places_of_their_own(steps, shared):
    """Of 4 rows and 3 columns; in another one, elements would be written over each other."""
    removed, groups = torch.ones(4, dtype=torch.bool, device=DEVICE), [(0, torch.arange(4, device=DEVICE))]
    targets = torch.tensor([0, 2, 1, 0], device=DEVICE)

    def entropy(matrix, backend):
        atp_kernels.cross_entropy_(matrix, targets, backend=backend)

    def prox(matrix, backend):
        atp_kernels.group_prox_([matrix], groups, removed, 0.5, backend=backend)

    def lasso_grad(matrix, backend):
        factor = torch.arange(12.0, device=DEVICE).view(4, 3).requires_grad_()
        factor.grad = matrix
        atp_kernels.group_lasso_grad_([factor], groups, removed, backend=backend)

    for op, call in (("cross_entropy_", entropy), ("group_prox_", prox), ("group_lasso_grad_", lasso_grad)):
        for backend in backends(op):
            matrix = windows(4, 3, *steps)
            before = matrix.clone()
            if shared:
                with pytest.raises(ValueError, match="has several elements in one place of memory: give a contiguous"):
                    call(matrix, backend)
                assert torch.equal(matrix, before)
            else:
                call(before, backend)
                call(matrix, backend)
                torch.testing.assert_close(matrix, before)
