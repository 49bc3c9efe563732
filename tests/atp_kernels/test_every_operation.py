"""What may be asked of every operation: a second derivative, a change of the result in place, shapes without data."""

from dataclasses import replace

import pytest
import torch
from operation_cases import CASES, K

from atp_kernels import KeptSlice, Projection, lora_dropout, masked_lora_qkv, rotary_embedding

RECORDED = [name for name, case in CASES.items() if not case.written and case.op != "compact"]
LINEAR_IN_X = [name for name in RECORDED if CASES[name].op in ("lora_dropout", "rotary_embedding")]
HOST = ("module", "merged", "first", "last", "kept-dropout", "separate")  # have parts that are made on the host
OF_X = [name for name in RECORDED if "x" in CASES[name].shapes and name not in ("module", "rotary_embedding")]


def first_of(case, backend="auto"):
    """(the first operand, which learns, and the sum of the results)."""
    operands = case.operands(torch.float32)
    x = next(iter(operands.values())).requires_grad_()
    return x, sum(y.sum() for y in case.call(operands, backend))


@pytest.mark.parametrize("name", [name for name in RECORDED if name not in LINEAR_IN_X])
def test_under_a_constant_upstream_gradient_it_is_refused(name):
    x, total = first_of(CASES[name])
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
    again, total = first_of(CASES[name])
    total.backward()
    torch.testing.assert_close(gradient.detach(), again.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: lora_dropout(x, 0.5, 7),
        lambda x: rotary_embedding(*[x.view(1, len(x), 1, 16)] * 2, *[torch.ones(1, len(x), 16)] * 2)[0],
    ],
)
def test_a_derivative_that_depends_on_nothing_is_a_constant(operation):
    x = torch.randn(3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(operation(x).sum(), x, create_graph=True)
    assert not gradient.requires_grad and gradient.count_nonzero() > 0


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("name", OF_X)
def test_a_result_may_be_changed_in_place(name, lead):
    """As that of `torch.nn.functional.linear`: a residual is added to it, or an activation works on it."""
    case = CASES[name]
    case = replace(case, shapes=case.shapes | {x: (*lead, K) for x in ("x", "lora_input") if x in case.shapes})
    (operands, again) = (case.operands(torch.float32) for _ in range(2))
    x, same = (given["x"].requires_grad_() for given in (operands, again))
    changed = case.call(operands, "auto")[0]
    changed.add_(1).mul_(3)
    plain = 3 * (case.call(again, "auto")[0] + 1)
    assert torch.equal(changed, plain)
    changed.square().sum().backward()
    plain.square().sum().backward()
    assert torch.equal(x.grad, same.grad)


@pytest.mark.parametrize("sliced", [False, True])
def test_q_k_and_v_may_be_changed_one_by_one(sliced):
    x, keep = torch.randn(2, 3, 16, requires_grad=True), torch.arange(16) % 3 > 0
    projections = [Projection(torch.randn(16, 16), torch.randn(4, 16), torch.randn(16, 4), 0.5) for _ in range(3)]
    slices = tuple(KeptSlice(one.weight, out_mask=keep) for one in projections) if sliced else None
    q, k, v = masked_lora_qkv(x, *projections, kept=slices)
    kept = k.detach().clone()
    q.mul_(2)
    assert torch.equal(k, kept)
    (q + k + v).sum().backward()
    assert x.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", [name for name in RECORDED if not any(part in name for part in HOST)])
def test_shapes_are_known_without_data(name):
    case = CASES[name]
    operands = case.operands(torch.float32)
    expected = [y.shape for y in case.call(operands, "auto")]
    on_host = ("hard", "out_hard", "in_hard") if "kept" in name else ()
    with torch.device("meta"):
        meta = {key: tensor if key in on_host else tensor.to("meta") for key, tensor in operands.items()}
        leaf = next(iter(meta.values())).requires_grad_()
        results = case.call(meta, "auto")
        sum(y.sum() for y in results).backward()
    assert [y.shape for y in results] == expected and leaf.grad.shape == leaf.shape
    assert all(tensor.is_meta for tensor in (*results, leaf.grad))
