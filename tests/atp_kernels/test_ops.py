"""The operators as torch.library, torch.compile and autocast see them."""

import pytest
import torch
from linear_cases import SEED, Shape, every_combination, operands, with_gradients
from torch.testing import assert_close

import atp_kernels
from atp_kernels import KeptSlice
from atp_kernels.kept import op as kept_op
from atp_kernels.linear import op

ORDER = ("x", "weight", "lora_a", "lora_b", "bias", "lora_input", "out_mask", "in_mask")
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
SHAPES = every_combination(Shape(m=5, n=6, k=7, rank=2))[::9] + [Shape(m=5, n=6, k=7, rank=2, mask_lora=True, p=0.4)]


def groups():
    rng = torch.Generator().manual_seed(0)
    factors = [torch.randn(6, 2, generator=rng).requires_grad_(), torch.randn(3, 6, generator=rng).requires_grad_()]
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    return factors, [(0, index), (1, index)], torch.tensor([True, False, True, True])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opcheck_linear(shape):
    tensors = operands(shape, torch.float32)
    arguments = [tensors.get(name) for name in ORDER]
    drawn = (shape.p, torch.tensor(SEED)) if shape.p else (0.0, None)
    arguments += [shape.scaling, shape.mask_lora, shape.out_mask == "soft", *drawn, "reference"]
    torch.library.opcheck(op.masked_lora_linear_op, tuple(arguments))


def step(factors, described, removed, scaling, tensors):
    y = atp_kernels.masked_lora_linear(**tensors, scaling=scaling)
    hidden = atp_kernels.masked_lora_linear(y[:, : tensors["x"].shape[1]], **block(tensors), scaling=scaling)
    return hidden, atp_kernels.group_lasso(factors, described, removed)


def block(tensors):
    return {name: tensor for name, tensor in tensors.items() if name not in ("x", "lora_input")}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(("dynamic", "planned"), [(False, False), (True, True)], ids=["list", "dynamic-plan"])
def test_compile_whole_graph(dynamic, planned, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    factors, described, removed = groups()
    if planned:
        described = atp_kernels.GroupPlan.of(factors, described, 4)
    for m in (5, 9, 12):
        tensors = operands(Shape(m=m, n=30, k=28), torch.float32)
        leaves = tensors | {f"factor {i}": factor for i, factor in enumerate(factors)}
        expected = with_gradients(step(factors, described, removed, 1.5, tensors), leaves)
        got = with_gradients(compiled(factors, described, removed, 1.5, tensors), leaves)
        assert_close(got, expected)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_of_the_direct_gradient(dynamic, compiler):
    """The first call makes every .grad, the others add to it."""
    torch._dynamo.reset()
    add = torch.compile(atp_kernels.group_lasso_grad_, fullgraph=True, dynamic=dynamic, backend=compiler)
    (factors, described, removed), (others, *_) = groups(), groups()
    for weight in (0.5, 0.25, torch.tensor(0.7)):
        value = add(factors, described, removed, weight=weight)
        torch.testing.assert_close(value, atp_kernels.group_lasso_grad_(others, described, removed, weight=weight))
        assert not value.requires_grad
        for factor, other in zip(factors, others, strict=True):
            torch.testing.assert_close(factor.grad, other.grad)


@pytest.mark.parametrize("kept", [False, True])
def test_double_backward_through_an_operator_is_refused(kept):
    tensors = operands(Shape(), torch.float32)
    if kept:
        sides = kept_op.flat(KeptSlice(tensors["weight"].detach()).sides)
        x, weight, lora_a, lora_b = (tensors[name] for name in ORDER[:4])
        y, _ = kept_op.kept_lora_linear_op(x, weight.detach(), None, lora_a, lora_b, None, *sides, 1.0, "auto")
    else:
        arguments = [tensors.get(name) for name in ORDER] + [1.0, False, True, 0.0, None, "reference"]
        y = op.masked_lora_linear_op(*arguments)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()
