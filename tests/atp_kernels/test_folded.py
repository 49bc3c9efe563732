"""The folded product: one weight with masks and adapter in it, against the definition and its gradients."""

import itertools

import pytest
import torch
from block_cases import saved_shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import Shape, assert_as_good_as_unfused, frozen, operands, shapes, unfused, with_gradients
from torch.testing import assert_close

from atp_kernels.linear.folded import folded_linear, refuses
from atp_kernels.linear.operands import Operands

KINDS = (None, "soft", "hard", "empty", "full")
ON_SUM = [
    Shape(out_mask=out_mask, in_mask=in_mask, mask_lora=True, bias=bias, dropout=False)
    for out_mask, in_mask, bias in itertools.product(KINDS, KINDS, (False, True))
]
ON_BASE = [
    Shape(out_mask=out_mask, in_mask=in_mask, bias=bias, dropout=False)
    for out_mask, in_mask, bias in itertools.product((None, "hard", "empty", "full"), (None, "hard"), (False, True))
]


def call(shape, tensors):
    return folded_linear(Operands(**tensors), shape.scaling, shape.mask_lora)


def run(shape, tensors):
    """y and its gradients."""
    return with_gradients((call(shape, tensors),), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ON_SUM + ON_BASE, ids=str)
def test_error_is_no_worse_than_unfused(shape, dtype):
    tensors = operands(shape, dtype)
    got = run(shape, frozen(tensors))
    # The definition's own gradients of weight and bias stand in for those that are not computed.
    plain = with_gradients(unfused(shape, tensors), tensors)
    assert_as_good_as_unfused(plain | got, shape, tensors)


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes(rank=st.sampled_from([0, 1, 8, 16]), mask_lora=st.just(True), dropout=st.just(False), p=st.just(0.0)),
    seed=st.integers(0, 2**16),
)
def test_equals_the_definition_with_zeros_in_soft_masks(shape, seed):
    """A gradient where the mask is zero is what brings a removed row back."""
    tensors = frozen(operands(shape, torch.float64, seed))
    for name in ("out_mask", "in_mask"):
        if name in tensors and tensors[name].requires_grad:
            with torch.no_grad():
                tensors[name][::3] = 0.0
    expected = with_gradients(unfused(shape, tensors)[:1], tensors)
    got = with_gradients((call(shape, tensors),), tensors)
    assert expected.keys() == got.keys()
    assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_mask_of_zero_removes_is_below_any_rounding(dtype):
    shape = Shape(in_mask=None, mask_lora=True, bias=False, dropout=False)
    tensors = frozen(operands(shape, dtype))
    whole = call(shape, tensors | {"out_mask": torch.ones(shape.n)})
    mask = torch.zeros(shape.n, requires_grad=True)
    y = call(shape, tensors | {"out_mask": mask})
    assert (y.abs() <= 2.0**-39 * whole.abs()).all()
    (d_mask,) = torch.autograd.grad(y.sum(), mask)
    assert_close(d_mask, whole.float().sum(0), rtol=4e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    constant = call(shape, tensors | {"out_mask": torch.zeros(shape.n)})
    assert torch.equal(constant, torch.zeros_like(constant))


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [(("x",), []), (("lora_a",), ["x"]), (("lora_b",), ["s"]), (("out_mask",), ["y"]), (("in_mask",), ["x"])],
)
def test_only_what_is_needed_is_kept(wanted, kept):
    shape = Shape(mask_lora=True, bias=False, dropout=False)
    tensors = operands(shape, torch.float32)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted)
    saved = saved_shapes(lambda: call(shape, tensors))
    sizes = {"x": (shape.m, shape.k), "s": (shape.m, shape.rank), "y": (shape.m, shape.n)}
    always = [tuple(tensors[name].shape) for name in ("weight", "lora_a", "lora_b", "out_mask", "in_mask")]
    assert saved == sorted([*always, *(sizes[name] for name in kept)])


def test_leading_dimensions_and_strides():
    shape = Shape(m=12, mask_lora=True, dropout=False)
    tensors = frozen(operands(shape, torch.float64))
    expected = with_gradients((call(shape, tensors),), tensors)
    rows = tensors["x"].detach().reshape(4, 3, -1).transpose(0, 1).requires_grad_()
    wide = torch.stack([tensors["out_mask"].detach()] * 2, 1)[:, 0].requires_grad_()
    y = call(shape, tensors | {"x": rows, "out_mask": wide, "weight": tensors["weight"].t().contiguous().t()})
    assert y.shape == (3, 4, shape.n)
    assert_close(y.transpose(0, 1).reshape(12, -1), expected["y"])
    upstream = torch.randn(12, shape.n, generator=torch.Generator().manual_seed(7)).double()
    d_x, d_mask = torch.autograd.grad(y, [rows, wide], upstream.reshape(4, 3, -1).transpose(0, 1))
    assert_close(d_x.transpose(0, 1).reshape(12, -1), expected["d x"])
    assert_close(d_mask, expected["d out_mask"])


def test_double_backward_and_a_changed_result_are_refused():
    shape = Shape(mask_lora=True, bias=False, dropout=False)
    tensors = frozen(operands(shape, torch.float32))
    (grad,) = torch.autograd.grad(call(shape, tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|once_differentiable"):
        grad.sum().backward()
    y = call(shape, tensors)
    total = y.sum()
    with torch.no_grad():
        y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_operands_that_cannot_be_folded_are_refused_with_the_reason():
    shape = Shape(dropout=False)
    tensors = operands(shape, torch.float32)
    assert "weight or bias has a gradient" in refuses(Operands(**tensors), True)
    with torch.no_grad():
        assert refuses(Operands(**tensors), True) is None
    tensors = frozen(tensors)
    assert refuses(Operands(**tensors), True) is None
    assert "does not cover the adapter" in refuses(Operands(**tensors), False)
    assert "input of its own" in refuses(Operands(**tensors, lora_input=tensors["x"].clone()), True)
    half = {name: tensor if name.endswith("mask") else tensor.detach().half() for name, tensor in tensors.items()}
    assert "float16 cannot hold" in refuses(Operands(**half), True)
    hard = {name: tensor.detach() for name, tensor in half.items()}
    assert refuses(Operands(**hard), True) is None
