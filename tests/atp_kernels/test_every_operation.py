"""What may be asked of every operation: a second derivative, a change of the result in place, shapes without data."""

import pytest
import torch

from atp_kernels import (
    KeptSlice,
    Projection,
    group_lasso,
    kept_lora_linear,
    lora_dropout,
    masked_lora_linear,
    masked_lora_linear_with_norms,
    masked_lora_qkv,
    masked_lora_swiglu,
    rms_norm,
    rotary_embedding,
)

WIDTH, RANK = 16, 4


def randn(*shape, learns=False):
    torch.manual_seed(sum(shape))
    return torch.randn(*shape).requires_grad_(learns)


def mask():
    return torch.arange(WIDTH) % 3 > 0


def projection():
    return Projection(randn(WIDTH, WIDTH), randn(RANK, WIDTH, learns=True), randn(WIDTH, RANK, learns=True), 0.5)


def linear(operation, x, **options):
    weight, lora_a, lora_b, scaling, _ = projection()
    return operation(x, weight, lora_a, lora_b, scaling=scaling, **options)


def kept(x):
    part = KeptSlice(randn(WIDTH, WIDTH), out_mask=torch.arange(WIDTH, device="cpu") % 2 == 0)
    return kept_lora_linear(x, part, randn(RANK, WIDTH, learns=True), randn(WIDTH, RANK, learns=True), scaling=0.5)


OPERATIONS = {
    "linear": lambda x: linear(masked_lora_linear, x),
    "masked linear": lambda x: linear(masked_lora_linear, x, out_mask=mask()),
    "linear with norms": lambda x: linear(masked_lora_linear_with_norms, x, out_mask=mask())[0],
    "kept linear": kept,
    "q, k and v": lambda x: masked_lora_qkv(x, projection(), projection(), projection())[1],
    "mlp": lambda x: masked_lora_swiglu(x, projection(), projection(), projection(), mask=mask()),
    "norm": lambda x: rms_norm(x, torch.ones(WIDTH), eps=1e-5),
    "lasso": lambda x: group_lasso([x], [(0, torch.zeros(len(x), dtype=torch.int64))], torch.tensor([True])),
    "separate lasso": lambda x: group_lasso([x], [(0, torch.arange(len(x)))], torch.ones(len(x), dtype=torch.bool)),
}


DROPPED = {
    "dropout": lambda x: lora_dropout(x, 0.5, 7),
    "linear with dropout": lambda x: linear(masked_lora_linear, x, out_mask=mask(), dropout=0.5, seed=7),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_under_a_constant_upstream_gradient_it_is_refused(name):
    x = randn(3, WIDTH, learns=True)
    (gradient,) = torch.autograd.grad(OPERATIONS[name](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_gradient_itself_is_that_of_a_plain_backward_pass(name):
    x, again = randn(3, WIDTH, learns=True), randn(3, WIDTH, learns=True)
    (gradient,) = torch.autograd.grad(OPERATIONS[name](x).sum(), x, create_graph=True)
    OPERATIONS[name](again).sum().backward()
    torch.testing.assert_close(gradient.detach(), again.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: lora_dropout(x, 0.5, 7),
        lambda x: rotary_embedding(*[x.view(1, len(x), 1, WIDTH)] * 2, *[torch.ones(1, len(x), WIDTH)] * 2)[0],
    ],
)
def test_a_derivative_that_depends_on_nothing_is_a_constant(operation):
    x = randn(3, WIDTH, learns=True)
    (gradient,) = torch.autograd.grad(operation(x).sum(), x, create_graph=True)
    assert not gradient.requires_grad and gradient.count_nonzero() > 0


@pytest.mark.parametrize("shape", [(WIDTH,), (3, WIDTH), (2, 3, WIDTH), (0, 3, WIDTH)], ids=str)
@pytest.mark.parametrize("name", [name for name in OPERATIONS | DROPPED if "lasso" not in name])
def test_a_result_may_be_changed_in_place(name, shape):
    """As that of `torch.nn.functional.linear`: a residual is added to it, or an activation works on it."""
    x, again, operation = randn(*shape, learns=True), randn(*shape, learns=True), (OPERATIONS | DROPPED)[name]
    changed = operation(x)
    changed.add_(1).mul_(3)
    plain = 3 * (operation(again) + 1)
    assert torch.equal(changed, plain)
    changed.square().sum().backward()
    plain.square().sum().backward()
    assert torch.equal(x.grad, again.grad)


@pytest.mark.parametrize("sliced", [False, True])
def test_q_k_and_v_may_be_changed_one_by_one(sliced):
    x, projections = randn(2, 3, WIDTH, learns=True), [projection() for _ in range(3)]
    slices = tuple(KeptSlice(one.weight, out_mask=mask()) for one in projections) if sliced else None
    q, k, v = masked_lora_qkv(x, *projections, kept=slices)
    kept = k.detach().clone()
    q.mul_(2)
    assert torch.equal(k, kept)
    (q + k + v).sum().backward()
    assert x.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", OPERATIONS | DROPPED)
def test_shapes_are_known_without_data(name):
    operation = (OPERATIONS | DROPPED)[name]
    expected = operation(randn(3, WIDTH)).shape
    with torch.device("meta"):
        x = randn(3, WIDTH, learns=True)
        y = operation(x)
        y.sum().backward()
    assert (y.shape, x.grad.shape) == (expected, x.shape) and y.is_meta and x.grad.is_meta
