"""A quantised weight: its entries by the definition, and every operation as on the floating weight it stands for.

That weight is the definition's, so results must agree to the bit: the operations are the same, the products too.
"""

import copy
import sys
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from linear_cases import Shape, operands, with_gradients
from operation_cases import CASES, K, N
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from atp_kernels import (
    KeptSlice,
    QuantizedWeight,
    available_backends,
    compact,
    kept_lora_linear,
    masked_lora_linear,
)
from atp_kernels.linear import ways
from atp_kernels.nn import MaskedLoRALinear
from atp_kernels.quantized import definition

KINDS = {
    "nf4": QuantizedWeight.nf4,
    "fp8 rows": QuantizedWeight.fp8,
    "fp8 tensor": partial(QuantizedWeight.fp8, per="tensor"),
    "int8": QuantizedWeight.int8,
}
HALF_STEP = {"nf4": 0.16, "fp8 rows": 2**-4, "fp8 tensor": 2**-4, "int8": 0.5 / 127}
"""The largest error as a share of the block's, row's or tensor's largest entry; NF4's widest gap is 0.304."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [name for name, missing in available_backends("cpu").items() if missing is None]
WIDE = Shape(m=6, n=24, k=128)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def matrix(n=24, k=128, dtype=torch.float32, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stands_for(weight):
    """The floating weight by the definition."""
    values = (definition.nf4 if weight.codes.dtype == torch.uint8 else definition.scaled)(weight.codes, weight.scale)
    values = values.to(weight.source)
    return (values if weight.columns is None else values[:, weight.columns]).to(weight.dtype)


# The tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_are_those_of_the_definition_and_near_the_weight(kind, dtype):
    weight = matrix(dtype=dtype)
    quantised = KINDS[kind](weight)
    assert quantised.shape == weight.shape and quantised.dtype == dtype and not quantised.requires_grad
    found = quantised.dequantize()
    assert type(found) is torch.Tensor and found.dtype == dtype
    assert torch.equal(found, stands_for(quantised))
    blocks = weight.double().unflatten(1, (-1, 64)).abs() if kind == "nf4" else weight.double().abs()
    largest = blocks.amax() if kind == "fp8 tensor" else blocks.amax(-1, keepdim=True)
    error = (found.double() - weight.double()).abs().view(blocks.shape)
    assert bool((error <= (HALF_STEP[kind] + torch.finfo(dtype).eps) * largest).all())


@pytest.mark.parametrize(
    ("kind", "bits"), [("nf4", 4.5), ("fp8 rows", 8.25), ("fp8 tensor", 8 + 1 / 96), ("int8", 8.25)]
)
def test_bytes(kind, bits):
    assert KINDS[kind](matrix()).nbytes == 24 * 128 * bits / 8
    part, left = KINDS[kind](matrix()).kept(torch.arange(12), torch.arange(64)), 128 if kind == "nf4" else 64
    scales = {"nf4": 12 * 2, "fp8 tensor": 1}.get(kind, 12)
    assert part.nbytes == 12 * left * (4 if kind == "nf4" else 8) / 8 + 4 * scales + (8 * 64 if kind == "nf4" else 0)


def test_a_strided_weight_is_quantised_by_its_values(kind):
    weight = matrix(k=256)[::2, ::2]
    for strided in (weight, weight.t().contiguous().t()):
        assert torch.equal(KINDS[kind](strided).dequantize(), KINDS[kind](weight.contiguous()).dequantize())


def test_zeros_stay_zeros(kind):
    assert not KINDS[kind](torch.zeros(4, 64)).dequantize().any()


@pytest.mark.parametrize("kind", ["fp8 rows", "fp8 tensor", "int8"])
def test_numbers_so_small_that_their_scale_is_rounded_keep_their_signs(kind):
    """2^-149 is the smallest number of all, and what a scale between two of these is rounded to may be too small."""
    steps = 178 if kind == "int8" else 635
    weight = torch.tensor([[1.0, -1.0] * 32] * 2) * steps * 2.0**-149
    assert torch.equal(KINDS[kind](weight).dequantize().sign(), weight.sign())


def test_copies_and_parts(kind):
    """Deep copies, clones, and what torch takes a tensor of tensors apart for."""
    quantised = KINDS[kind](matrix()).kept(torch.arange(12), torch.arange(64))
    names, context = quantised.__tensor_flatten__()
    inner = {name: getattr(quantised, name) for name in names}
    put_together = QuantizedWeight.__tensor_unflatten__(inner, context, quantised.shape, quantised.stride())
    for same in (quantised.clone(), copy.deepcopy(quantised), put_together):
        assert type(same) is QuantizedWeight and same.shape == quantised.shape
        assert torch.equal(same.dequantize(), quantised.dequantize())
    assert quantised.clone().codes.data_ptr() != quantised.codes.data_ptr()
    layer = MaskedLoRALinear(KINDS[kind](matrix()), r=4, alpha=8)
    nn.init.normal_(layer.lora_B)
    layer.out_mask, x = torch.arange(24) % 2 > 0, torch.randn(3, 128)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert_close(layer.merge()(x), layer(x), rtol=1e-4, atol=1e-4)


def test_kept_rows_and_columns_are_exactly_those_of_the_whole(kind):
    quantised = KINDS[kind](matrix())
    whole, rows, columns = quantised.dequantize(), torch.tensor([7, 2, 23]), torch.tensor([100, 5, 64, 65])
    assert torch.equal(quantised.kept(rows, None).dequantize(), whole[rows])
    assert torch.equal(quantised.kept(None, columns).dequantize(), whole[:, columns])
    part = quantised.kept(rows, columns)
    assert torch.equal(part.dequantize(), whole[rows][:, columns]) and part.shape == (3, 4)
    again = part.kept(torch.tensor([2]), torch.tensor([3, 1]))
    assert torch.equal(again.dequantize(), whole[23:24][:, [65, 5]])
    assert torch.equal(part.kept(torch.tensor([1]), None).dequantize(), whole[2:3][:, columns])
    assert torch.equal(quantised.kept(rows[:0], None).dequantize(), whole[:0])
    assert part.nbytes < quantised.nbytes


def test_a_cast_changes_what_it_is_dequantised_to_and_not_its_parts(kind):
    quantised = KINDS[kind](matrix(dtype=torch.bfloat16))
    cast = quantised.to(torch.float32)
    assert cast.codes is quantised.codes and cast.scale is quantised.scale
    assert torch.equal(cast.dequantize(), quantised.dequantize().float()), "rounded to what it was made from first"


def test_it_lives_in_a_module(kind):
    linear = nn.Linear(128, 24)
    quantised = KINDS[kind](linear.weight)
    linear.weight = nn.Parameter(quantised, requires_grad=False)
    assert isinstance(linear.weight, QuantizedWeight) and isinstance(linear.weight, nn.Parameter)
    assert sum(p.numel() for p in linear.parameters()) == 24 * 128 + 24
    other = nn.Linear(128, 24, device="meta").requires_grad_(False)
    other.load_state_dict(linear.state_dict(), assign=True)
    other.to(torch.float64)
    assert torch.equal(other.weight.dequantize(), quantised.dequantize().double())
    x = torch.randn(2, 3, 128, requires_grad=True)
    plain = nn.Linear(128, 24)
    plain.weight, plain.bias = nn.Parameter(quantised.dequantize(), requires_grad=False), linear.bias
    results = [torch.autograd.grad((layer(x) ** 2).sum(), (x, linear.bias)) for layer in (linear, plain)]
    assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functional_linear_follows_autocast(kind, dtype):
    quantised, bias = KINDS[kind](matrix(dtype=dtype)), torch.randn(24)
    x = torch.randn(2, 3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        results = [F.linear(x, weight, bias) for weight in (quantised, quantised.dequantize())]
    assert results[0].dtype == torch.bfloat16 and torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(y.float().sum(), x)[0] for y in results))


def test_what_it_is_not():
    quantised = QuantizedWeight.int8(matrix())
    for call in (lambda: quantised + 1, lambda: quantised.t() @ matrix(), lambda: compact(quantised, None, None)):
        with pytest.raises(NotImplementedError, match=r"not defined for a quantised weight: call its dequantize\(\)"):
            call()
    with pytest.raises(ValueError, match="2-D floating tensor, not torch.int64"):
        QuantizedWeight.int8(torch.ones(4, 4, dtype=torch.int64))
    for wrong in (torch.ones(4), quantised):
        with pytest.raises(ValueError, match="must be a 2-D floating tensor, not"):
            QuantizedWeight.int8(wrong)
    with pytest.raises(ValueError, match="multiple of 64: use fp8 or int8"):
        QuantizedWeight.nf4(torch.ones(4, 96))
    with pytest.raises(ValueError, match="use 'row' or 'tensor'"):
        QuantizedWeight.fp8(matrix(), per="block")


def test_without_bitsandbytes_one_sentence_says_so(monkeypatch):
    quantised = QuantizedWeight.nf4(matrix())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for call in (quantised.dequantize, lambda: QuantizedWeight.nf4(matrix())):
        with pytest.raises(ImportError, match="NF4 weights need bitsandbytes: pip install"):
            call()
    assert QuantizedWeight.int8(matrix()).dequantize().shape == (24, 128)


@pytest.mark.parametrize("nested", [False, True])
def test_weights_of_bitsandbytes_are_taken_as_they_are(nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.nn import Params4bit

    parameter = Params4bit(matrix(), requires_grad=False, quant_type="nf4", compress_statistics=nested).to("cpu")
    taken = QuantizedWeight.from_bitsandbytes(parameter)
    assert taken.codes.data_ptr() == parameter.data.data_ptr()
    assert torch.equal(taken.dequantize(), functional.dequantize_4bit(parameter.data, parameter.quant_state))
    others = [(matrix(), {"quant_type": "fp4"}), (matrix(), {"blocksize": 128}), (matrix(k=96), {})]
    options = {"requires_grad": False, "quant_type": "nf4"}
    for wrong in (matrix(), *(Params4bit(weight, **options | other).to("cpu") for weight, other in others)):
        with pytest.raises(ValueError, match="only bitsandbytes' NF4 in blocks of 64"):
            QuantizedWeight.from_bitsandbytes(wrong)
    parameter.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="has packed this weight anew for its CPU kernels"):
        QuantizedWeight.from_bitsandbytes(parameter)


# The operations


def linear(tensors, weight, **options):
    return masked_lora_linear(**tensors | {"weight": weight}, **options)


def both(tensors, quantised, call):
    """Results and gradients of a call with a quantised weight and with the floating one that it stands for."""
    frozen = {name: tensor for name, tensor in tensors.items() if name != "weight"}
    return [with_gradients((call(frozen, weight),), frozen) for weight in (quantised, stands_for(quantised))]


OF_WEIGHTS = [name for name in CASES if name.startswith(("linear", "swiglu", "qkv", "kept")) and "merged" not in name]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_linears_mlp_and_kept_slices(kind, name, dtype, backend):
    case = CASES[name].sized({K: 128, N: 64})
    weights = [operand for operand in case.shapes if operand.endswith("weight")]
    case = replace(case, frozen=(*case.frozen, *weights))
    quantised = {name: KINDS[kind](weight) for name, weight in case.operands(dtype).items() if name in weights}
    for cast in (False, True)[: 1 + name.startswith("kept")]:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            got, expected = (
                case.run(case.operands(dtype) | given, backend, torch.ones_like)
                for given in (quantised, {name: stands_for(weight) for name, weight in quantised.items()})
            )
        assert "d x" in got
        assert_close(got, expected, rtol=0, atol=0)


def test_a_mask_that_would_pay_for_a_slice_of_a_floating_weight(kind, monkeypatch):
    """Each call dequantises the whole and takes the backend that it would take without the mask."""
    for name, value in (("FEWEST_ROWS", 1), ("LARGEST_SHARE", 1.0), ("LEAST_SAVED", 0)):
        monkeypatch.setattr(ways, name, value)
    shape = Shape(m=6, n=24, k=128, out_mask="hard", in_mask="hard", bias=False, dropout=False)
    tensors = operands(shape, torch.float32)
    quantised = KINDS[kind](tensors["weight"])
    assert [
        linear(tensors, weight, **shape.options).grad_fn.name() for weight in (quantised, stands_for(quantised))
    ] == ["MaskedLoraLinearBackward", "KeptLoraLinearBackward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_under_autocast_with_a_constant_adapter(kind, dtype):
    """There a floating float32 weight has the adapter merged in, which would leave a copy of it to autograd."""
    tensors = operands(Shape(m=6, n=24, k=128, mask_lora=True, dropout=False), dtype)
    quantised = KINDS[kind](tensors["weight"])
    tensors["lora_a"].requires_grad_(False)
    tensors["lora_b"].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = both(tensors, quantised, partial(linear, scaling=1.7, mask_lora=True))
    assert_close(got, expected, rtol=0.1, atol=0.1)


def test_what_the_operations_refuse(kind):
    tensors = operands(WIDE, torch.float32)
    quantised = KINDS[kind](tensors["weight"])
    for call in (lambda weight: linear(tensors, weight, scaling=1.0), lambda weight: F.linear(tensors["x"], weight)):
        with pytest.raises(ValueError, match="weight is quantised and requires a gradient: freeze it"):
            call(quantised.requires_grad_())
    with pytest.raises(ValueError, match="weight requires a gradient and a slice is frozen"):
        KeptSlice(quantised)
    quantised.requires_grad_(False)
    with pytest.raises(ValueError, match="weight is torch.float32 and x is torch.bfloat16"):
        masked_lora_linear(
            tensors["x"].bfloat16(), quantised, tensors["lora_a"], tensors["lora_b"], scaling=1.0
        )  # fmt: skip
    frozen = {name: tensor.detach() for name, tensor in tensors.items() if name != "weight"}
    compiled = torch.compile(lambda weight: linear(frozen, weight, scaling=1.0), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="torch.compile does not trace a quantised weight"):
        compiled(quantised)


# Memory


@pytest.mark.parametrize("how", ["plain", "masked", "kept", "autocast", "linear"])
def test_nothing_floating_outlives_a_pass(kind, how, monkeypatch):
    """No saved tensor is a floating matrix of the weight's size, and each is gone when the next is made."""
    quantised, made = KINDS[kind](matrix(48, 192)), []
    own = QuantizedWeight.dequantize

    def watched(weight):
        assert all(ref() is None for ref in made), "one floating matrix at a time"
        found = own(weight)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(QuantizedWeight, "dequantize", watched)
    x = torch.randn(5, 192, requires_grad=True)
    a, b = torch.randn(4, 192, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    keep = torch.arange(48) % 2 > 0
    kept = KeptSlice(quantised, out_mask=keep)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    calls = {
        "plain": lambda: masked_lora_linear(x, quantised, a, b, scaling=1.0),
        "masked": lambda: masked_lora_linear(x, quantised, a, b, scaling=1.0, out_mask=keep, mask_lora=True),
        "kept": lambda: kept_lora_linear(x, kept, a, b, scaling=1.0),
        "autocast": lambda: masked_lora_linear(x, quantised, a, b, scaling=1.0),
        "linear": lambda: F.linear(x, quantised),
    }
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            y = calls[how]()
            z = calls[how]()
    assert saved and all(type(t) is QuantizedWeight or t.numel() < 24 * 192 for t in saved)
    assert len(made) == 2 and all(ref() is None for ref in made)
    (y.float().square().sum() + z.float().sum()).backward()
    assert len(made) == 4 and all(ref() is None for ref in made), "each pass has its own"
