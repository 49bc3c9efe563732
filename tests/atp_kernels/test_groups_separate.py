"""Group lasso of separate plans, whose forward pass finds the gradient: its autograd rules and the native loops."""

from copy import copy
from types import SimpleNamespace

import pytest
import torch
from group_cases import planned, plans
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_kernels import GroupPlan, extension, group_lasso
from atp_kernels.call import Choice
from atp_kernels.groups import aten, definition, native, op

EPS = 1e-8
SIZES = ((13, 8, 0), (8, 37, 1), (5, 3, 0), (300, 2, 1))
needs_native = pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))


def problem():
    return planned("separate", SIZES)


class Plain:
    """Both ways to the lasso in plain PyTorch, without the extension, and what they were asked."""

    group_lasso_forward = staticmethod(aten.group_lasso_forward)
    group_lasso_backward = staticmethod(aten.group_lasso_backward)

    def __init__(self):
        self.asked = []

    def separate_lasso_forward(self, factors, plan, removed, eps, with_direction):
        self.asked.append(with_direction)
        value, norms = self.group_lasso_forward(factors, plan, removed, eps)
        grads = self.group_lasso_backward(factors, plan, removed, norms, torch.ones(()))
        return value, torch.cat([grad.flatten() for grad in grads]) if with_direction else torch.empty(0)

    def separate_lasso_backward(self, direction, plan, grad_out, in_place):
        scaled = direction.mul_(grad_out) if in_place else direction * grad_out
        parts = scaled.split([shape.numel() for shape in plan.shapes])
        return [part.view(shape) for part, shape in zip(parts, plan.shapes, strict=True)]


@pytest.fixture(params=["plain", pytest.param("native", marks=needs_native)])
def module(request, monkeypatch):
    """What `group_lasso` runs on."""
    chosen = Plain() if request.param == "plain" else native
    monkeypatch.setattr(op, "select", lambda *_: Choice(chosen, request.param, ""))
    return chosen


def expected(factors, plan, removed, upstream=1.0):
    value = definition.group_lasso(factors, plan.groups, removed)
    return torch.autograd.grad(upstream * value, factors)


def test_a_plan_knows_whether_its_groups_are_separate():
    factors, plan, _ = problem()
    assert plan.separate and plan.sides == (13, 8, 8, 37, 5, 3, 300, 2)
    groups, n = [(axis, index.long()) for axis, index in plan.groups], plan.n_groups
    axis, first = groups[0]
    for other in (first.flip(0), torch.zeros_like(first)):
        assert not GroupPlan.of(factors, [(axis, other), *groups[1:]], n).separate
    assert not GroupPlan.of(factors, groups, n + 1).separate  # the last group owns nothing


def runs(*ids, n_groups):
    """Whether the plan of such rows is one of runs."""
    factors = [torch.ones(len(index), 2) for index in ids]
    plan = GroupPlan.of(factors, [(0, torch.tensor(index, dtype=torch.int64)) for index in ids], n_groups)
    assert plan.runs or not plan.separate
    return plan.runs


def test_a_plan_knows_whether_its_groups_are_runs():
    assert runs([0, 0, 1], [2, 3, 3], n_groups=4) and runs([0, 1], [2], n_groups=3)
    assert runs([], [0, 0], [], [], [1], [], n_groups=2) and runs([0, 0, 0], n_groups=1)
    assert not runs([0, 0, 1], [1, 2], n_groups=3), "one group in two factors"
    assert not runs([], [0], [], [0, 1], n_groups=2), "one group in two factors with none between them"
    assert not runs([0, 1, 0, 1], n_groups=2), "a group in two places"
    assert not runs([1, 1, 2], n_groups=3) and not runs([0, 0, 2], n_groups=3), "an empty group"
    assert not runs([0, 0, 1], n_groups=3), "an empty group at the end"
    assert not GroupPlan.of([torch.ones(2, 3)], [(0, torch.zeros(2, dtype=torch.int64))], 1).separate


def test_separate_plans_of_one_dtype_take_the_short_way(monkeypatch):
    plain = Plain()
    monkeypatch.setattr(op, "select", lambda *_: Choice(plain, "plain", ""))
    factors, plan, removed = problem()
    group_lasso(factors, plan, removed)
    assert plain.asked == [True]
    joint = copy(plan)
    joint.separate = False
    group_lasso(factors, joint, removed)
    group_lasso([factors[0].bfloat16(), *factors[1:]], plan, removed)
    assert plain.asked == [True]
    with torch.no_grad():
        group_lasso(factors, plan, removed)
    group_lasso([factor.detach() for factor in factors], plan, removed)
    assert plain.asked == [True, False, False]


@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0])
def test_gradients_of_graphs_kept_and_freed(module, upstream):
    factors, plan, removed = problem()
    wanted = expected(factors, plan, removed, upstream)
    value = upstream * group_lasso(factors, plan, removed)
    for keep in (True, True, False):
        grads = torch.autograd.grad(value, factors, retain_graph=keep)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want)
            grad.fill_(7.0)  # a gradient is its owner's: the next pass must not see this
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, factors)


def test_the_private_name_in_torch_is_only_asked_up_to_the_version_it_was_seen_in(monkeypatch):
    """`torch._C._autograd._get_current_graph_task_keep_graph` has no public counterpart."""
    assert torch.__version__ < op.TORCH_TOO_NEW, "see that it still exists, then raise TORCH_TOO_NEW"
    plain, kept = Plain(), []
    backward = plain.separate_lasso_backward
    plain.separate_lasso_backward = lambda *given: kept.append(not given[-1]) or backward(*given)
    monkeypatch.setattr(op, "select", lambda *_: Choice(plain, "plain", ""))
    factors, plan, removed = problem()
    wanted = expected(factors, plan, removed, 1.0)
    for too_new in (op.TORCH_TOO_NEW, "2.0"):
        monkeypatch.setattr(op, "TORCH_TOO_NEW", too_new)
        value = group_lasso(factors, plan, removed)
        for keep in (True, False):
            torch.testing.assert_close(torch.autograd.grad(value, factors, retain_graph=keep), wanted)
    assert kept == [True, False, True, True]


def test_the_gradient_is_that_of_the_values_at_the_forward_pass(module):
    factors, plan, removed = problem()
    wanted = expected(factors, plan, removed)
    value = group_lasso(factors, plan, removed)
    with torch.no_grad():
        for factor in factors:
            factor.zero_()
    torch.testing.assert_close(torch.autograd.grad(value, factors), wanted)


@needs_native
@settings(max_examples=40, derandomize=True, deadline=None)
@given(plans("separate"), st.sampled_from([EPS, 0.0, 0.5]), st.floats(-3, 3, width=32))
def test_native_agrees_with_its_joint_loops(case, eps, upstream):
    factors, plan, removed = case
    factors = [factor.detach() for factor in factors]
    joint, norms = native.group_lasso_forward(factors, plan, removed, eps)
    grads = native.group_lasso_backward(factors, plan, removed, norms, torch.ones(()))
    value, direction = native.separate_lasso_forward(factors, plan, removed, eps, True)
    torch.testing.assert_close(value, joint, rtol=2**-23, atol=0)
    for in_place in (False, True):
        got = native.separate_lasso_backward(direction, plan, torch.tensor(upstream), in_place)
        for mine, grad in zip(got, grads, strict=True):
            assert mine.dtype == grad.dtype and mine.data_ptr() % 64 == grad.data_ptr() % 64 == 0
            assert torch.equal(mine, (grad.float() * upstream).to(grad.dtype))
        same = got[0].untyped_storage().data_ptr() == direction.untyped_storage().data_ptr()
        assert same == in_place or not direction.numel()


@needs_native
def test_native_without_gradient_makes_nothing_of_the_size_of_the_factors():
    factors, plan, removed = problem()
    with torch.no_grad():
        value, direction = native.separate_lasso_forward(factors, plan, removed, EPS, False)
    assert direction.numel() == 0
    assert value == native.group_lasso_forward(factors, plan, removed, EPS)[0]


@needs_native
def test_native_refuses_what_does_not_fit_in_one_sentence():
    factors, plan, removed = problem()
    factors = [factor.detach() for factor in factors]
    call = native.separate_lasso_forward
    direction = call(factors, plan, removed, EPS, True)[1]
    for arguments, message in (
        (([factors[0].bfloat16(), *factors[1:]], plan, removed), "factors must share a dtype"),
        ((factors, plan, removed[:-1]), "removed must be contiguous"),
        (([factor.half() for factor in factors], plan, removed), "float32 or bfloat16"),
        ((factors, SimpleNamespace(axes=(0,)), removed), "4 factors and 1 axes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments, EPS, True)
    for changed, grad_out in ((direction[:-64], torch.ones(())), (direction, torch.ones(2))):
        with pytest.raises(RuntimeError, match="cannot be placed|pieces fill|one float32"):
            native.separate_lasso_backward(changed, plan, grad_out, True)
