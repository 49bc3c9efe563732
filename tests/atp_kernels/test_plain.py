"""The LoRA linear without masks in eager mode: its short way, and the checks that it passes in a few comparisons."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from block_cases import saved_shapes
from linear_cases import Shape, operands, peak

from atp_kernels import masked_lora_linear, triton_runtime
from atp_kernels.call import ENVIRONMENT, override
from atp_kernels.linear import aten
from atp_kernels.linear import operands as linear_operands
from atp_kernels.linear.operands import Needs, Operands, Options, Saved
from benchmarks.baselines import AddmmLora

BARE = Shape(out_mask=None, in_mask=None, bias=False, dropout=False)
PLAIN = [
    Shape(out_mask=None, in_mask=None, bias=bias, dropout=False, scaling=scaling)
    for bias, scaling in itertools.product((False, True), (1.0, 1.7))
]
NAMES = ("x", "weight", "lora_a", "lora_b", "bias")


def call(shape, tensors, **options):
    return masked_lora_linear(**tensors, scaling=shape.scaling, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", PLAIN, ids=str)
@pytest.mark.parametrize("frozen", [(), *itertools.combinations(NAMES[:4], 2), NAMES[1:4], NAMES[2:4]], ids=str)
def test_results_are_those_of_the_reference_backend_to_the_last_bit(shape, dtype, frozen):
    """Which test_linear.py holds to the definition."""
    tensors = operands(shape, dtype)
    for name in frozen:
        tensors[name].requires_grad_(False)
    needs = Needs(*(name in tensors and tensors[name].requires_grad for name in (*NAMES, "", "", "")))
    values = [tensors[name].detach() if name in tensors else None for name in NAMES]
    y, s, *_ = aten.forward(Operands(*values), Options(shape.scaling))
    grad = torch.randn_like(y)
    saved = Saved(*values[:4], None, None, None, s, None)
    grads = aten.backward(grad, saved, Options(shape.scaling), needs)
    got = call(shape, tensors)
    assert got.grad_fn.name() == "LoraLinearBackward" and torch.equal(got, y)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    expected = [grad for grad in grads if grad is not None]
    assert all(map(torch.equal, torch.autograd.grad(got, leaves, grad), expected))


@pytest.mark.parametrize(
    ("wanted", "kept"), [(("x",), ()), (("lora_a",), ("x",)), (("lora_b",), ("s",)), (("weight",), ("x",))]
)
def test_only_what_is_needed_is_kept(wanted, kept):
    tensors = operands(BARE, torch.float32)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted)
    shapes = {"x": (BARE.m, BARE.k), "s": (BARE.m, BARE.rank)}
    saved = saved_shapes(lambda: call(BARE, tensors))
    factors = [tuple(tensors[name].shape) for name in ("weight", "lora_a", "lora_b")]
    assert saved == sorted([*factors, *(shapes[name] for name in kept)])


@pytest.mark.parametrize(
    "options",
    [
        {"out_mask": torch.ones(20)},
        {"in_mask": torch.ones(28, dtype=torch.bool)},
        {"lora_input": torch.ones(12, 28)},
        {"dropout": 0.5, "seed": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_is_more_takes_the_masked_linear(options):
    y = call(BARE, operands(BARE, torch.float32), **options)
    assert y.grad_fn.name() == "MaskedLoraLinearBackward"


@pytest.mark.skipif(triton_runtime.REASON is not None, reason=str(triton_runtime.REASON))
def test_a_named_kernel_is_not_passed_by():
    y = call(BARE, operands(BARE, torch.float32), backend="triton")
    assert y.grad_fn.name() == "MaskedLoraLinearBackward"


def variations():
    """Every operand of another shape, dtype and device, one at a time, of a call with all of them and of a bare one."""
    everything = itertools.product((Shape(), BARE), operands(Shape(), torch.float32).items())
    for shape, (name, tensor) in everything:
        tensor = tensor.detach()
        others = {"none": tensor, "short": tensor[..., :-1], "low": tensor[:-1], "flat": tensor.flatten()}
        others |= {"unit": tensor[:1], "scalar": tensor.sum(), "deep": tensor.unsqueeze(0)}
        others |= {str(dtype): tensor.to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool)}
        others["meta"] = tensor.to("meta")
        for what, other in others.items():
            yield pytest.param(shape, name, other, id=f"{'bare' if shape is BARE else 'full'}-{name}-{what}")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("shape", "name", "other"), list(variations()))
def test_quick_checks_change_no_result_and_no_message(shape, name, other, autocast, monkeypatch):
    tensors = {**operands(shape, torch.float32), name: other}

    def outcome():
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return masked_lora_linear(**tensors, scaling=1.7)
        except ValueError as error:
            return str(error)

    quick = outcome()
    monkeypatch.setattr(linear_operands, "_are_ready", lambda *operands: False)
    thorough = outcome()
    assert type(quick) is type(thorough)
    assert quick == thorough if isinstance(quick, str) else torch.equal(quick, thorough)


def test_quick_checks_pass_what_needs_no_cast():
    for shape, dtype in itertools.product(
        (BARE, Shape(), Shape(out_mask="hard", in_mask="hard")), (torch.float32, torch.float64)
    ):
        tensors = operands(shape, dtype)
        order = (*NAMES, "lora_input", "out_mask", "in_mask")
        assert linear_operands._are_ready(*(tensors.get(name) for name in order))


def test_environment_counts_when_it_is_read_anew(monkeypatch, request):
    request.addfinalizer(override.cache_clear)
    tensors = operands(BARE, torch.float32)
    for name, raises in (("nothing", True), (None, False), ("reference", False), ("nothing", True)):
        if name is None:
            monkeypatch.delenv(ENVIRONMENT, raising=False)
        else:
            monkeypatch.setenv(ENVIRONMENT, name)
        override.cache_clear()
        with pytest.raises(ValueError, match="'nothing' is not a backend") if raises else nullcontext():
            call(BARE, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_is_that_of_the_addmm_idiom(dtype):
    """Also where 16-bit products take a float32 copy of their result, as on a CPU without instructions for them."""
    tensors = operands(
        Shape(m=2048, n=512, k=512, rank=16, out_mask=None, in_mask=None, bias=False, dropout=False), dtype
    )
    tensors["weight"].requires_grad_(False)
    grad, leaves = torch.ones(2048, 512, dtype=dtype), tuple(tensors[name] for name in ("x", "lora_a", "lora_b"))
    x, weight, lora_a, lora_b = (tensors[name] for name in NAMES[:4])
    ours = peak(lambda: masked_lora_linear(x, weight, lora_a, lora_b, scaling=1.0), leaves, grad)
    assert ours <= peak(lambda: AddmmLora.apply(x, weight, lora_a, lora_b), leaves, grad) + 2**12
