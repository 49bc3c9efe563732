"""`group_lasso_grad_`: the gradient of the group lasso added to `.grad` without autograd, held to autograd's."""

import pytest
import torch
from backends_here import DEVICE, takes
from group_cases import KINDS, problem, with_grads

from atp_kernels import GroupPlan, extension, group_lasso, group_lasso_grad_
from atp_kernels.groups import native

BACKENDS = [name for name in ("reference", "native") if takes("group_lasso_grad_", torch.float32, name)]
SIZES = ((13, 8, 0), (8, 37, 1), (5, 3, 0), (300, 2, 1))
WEIGHT = 0.3
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason=str(extension.REASON))
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def direct(factors, *described, weight=WEIGHT, **options):
    """The value, and all gradients after the direct call."""
    value = group_lasso_grad_(factors, *described, weight=weight, **options)
    return value, *(factor.grad for factor in factors)


def through_autograd(factors, *described, weight=WEIGHT, **options):
    """The value, and all gradients after the backward pass."""
    value = group_lasso(factors, *described, **options)
    (weight * value).backward()
    return value.detach(), *(factor.grad for factor in factors)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@every_kind
def test_it_is_what_autograd_gives(backend, kind):
    for weight in (WEIGHT, torch.tensor(WEIGHT, device=DEVICE), torch.tensor(-2.5, dtype=torch.float64, device=DEVICE)):
        (factors, *described), (others, *_) = (problem(SIZES, kind=kind) for _ in range(2))
        for _ in range(2):  # the first time there is no gradient, the second time there is
            got = direct(factors, *described, weight=weight, eps=0.5, backend=backend)
            expected = through_autograd(others, *described, weight=weight, eps=0.5, backend=backend)
            assert not got[0].requires_grad
            torch.testing.assert_close(got, expected)


@every_backend
@every_kind
def test_bitwise_equal_over_runs_and_over_plan_and_list(backend, kind):
    factors, groups, removed = problem(SIZES, kind=kind)
    plan = GroupPlan.of(factors, groups, len(removed))
    first = [result.clone() for result in direct(with_grads(factors), groups, removed, backend=backend)]
    for run in range(10):
        again = direct(with_grads(factors), plan if run % 2 else groups, removed, backend=backend)
        assert all(map(torch.equal, again, first))


@every_backend
def test_frozen_factors_count_and_get_nothing(backend):
    factors, *described = problem(SIZES)
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
    factors, *described = problem(SIZES)
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
    factors, groups, removed = problem(SIZES)
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
    factors, groups, removed = problem(SIZES)
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
