"""The masked LoRA linear on the backends of a CPU, its autograd and its checks."""

import pytest
import torch
from block_cases import saved_shapes
from linear_cases import Shape, assert_as_good_as_unfused, every_combination, operands, with_gradients
from torch.testing import assert_close

from atp_kernels import extension, masked_lora_linear
from atp_kernels.linear import op

COMBINATIONS = every_combination(Shape()) + every_combination(Shape(p=0.4))
SOFT = Shape(mask_lora=True)
CALLS = [
    *((dtype, "reference") for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *((dtype, "native") for dtype in (torch.float32, torch.bfloat16) if extension.AVAILABLE),
]


def run(shape, tensors, backend="reference"):
    return with_gradients((masked_lora_linear(**tensors, **shape.options, backend=backend),), tensors)


@pytest.mark.parametrize(("dtype", "backend"), CALLS, ids=str)
@pytest.mark.parametrize("shape", COMBINATIONS, ids=str)
def test_error_is_no_worse_than_unfused(shape, dtype, backend):
    tensors = operands(shape, dtype)
    got = run(shape, tensors, backend)
    assert_as_good_as_unfused(got, shape, tensors)


def test_float32_mask_beside_bfloat16_keeps_its_precision():
    n = 64
    mask = torch.full((n,), 1 - 2**-9).requires_grad_()
    x = torch.ones(256, 8, dtype=torch.bfloat16)
    weight = torch.eye(n, 8, dtype=torch.bfloat16)
    zeros = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(n, 1, dtype=torch.bfloat16)
    y = masked_lora_linear(x, weight, *zeros, scaling=1.0, out_mask=mask)
    assert y.dtype == torch.bfloat16
    assert (y[:, :8] == torch.tensor(1 - 2**-9).bfloat16()).all()
    y.sum().backward()
    assert mask.grad.dtype == torch.float32 and torch.equal(mask.grad[:8], torch.full((8,), 256.0))


def test_only_what_is_needed_is_kept():
    tensors = operands(Shape(out_mask="hard", in_mask=None), torch.float32)
    tensors["weight"].requires_grad_(False)
    kept = saved_shapes(lambda: masked_lora_linear(**tensors, scaling=1.0))
    operand_shapes = [tuple(tensors[n].shape) for n in ("weight", "lora_a", "lora_b", "lora_input", "out_mask")]
    assert kept == sorted([*operand_shapes, (12, 4)])


@pytest.mark.parametrize("frozen", [(), ("x",), ("lora_input",), ("x", "lora_input")], ids=str)
def test_compiled_operator_equals_eager(frozen):
    tensors = operands(SOFT, torch.float32)
    for name in frozen:
        tensors[name].requires_grad_(False)
    arguments = [tensors[name] for name in ("x", "weight", "lora_a", "lora_b", "bias", "lora_input")]
    arguments += [tensors["out_mask"], tensors["in_mask"], SOFT.scaling, True, True, 0.0, None, "reference"]
    y, *_ = op.masked_lora_linear_op(*arguments)
    got = with_gradients((y,), tensors)
    expected = run(SOFT, tensors)
    assert_close(got, expected, rtol=0, atol=0)


BAD = [
    ({"x": torch.ones(3, 4)}, r"x has shape \[3, 4\], but weight"),
    ({"lora_b": torch.ones(20, 3)}, r"lora_b has shape \[20, 3\]"),
    ({"bias": torch.ones(3)}, "bias has shape"),
    ({"out_mask": torch.ones(28)}, "out_mask has shape"),
    ({"in_mask": torch.ones(28, dtype=torch.int64)}, "in_mask is torch.int64: give a bool or floating mask"),
    ({"x": torch.ones(12, 28).bfloat16()}, "weight is torch.float32 and x is torch.bfloat16"),
    ({"weight": torch.ones(28)}, "must be 2-D"),
    ({"lora_a": torch.ones(4, 28, device="meta")}, "lora_a is on meta and x on cpu"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_wrong_operands_are_one_clear_sentence(changed, message):
    with pytest.raises(ValueError, match=message):
        masked_lora_linear(**{**operands(Shape(), torch.float32), **changed}, scaling=1.0)
