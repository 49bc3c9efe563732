"""The LoRA step on the kept slice of the base weight, against the masked definition on the whole of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import Shape, assert_as_good_as_unfused, operands, unfused, with_gradients
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from atp_kernels import KeptSlice, available_backends, kept_lora_linear, masked_lora_linear
from atp_kernels.linear import definition

KINDS = (None, "hard", "empty", "full")
BOTH = Shape(m=12, n=44, k=52, out_mask="hard", in_mask="hard")
COMBINATIONS = [
    replace(BOTH, out_mask=out_mask, in_mask=in_mask, bias=bias, dropout=dropout)
    for out_mask in KINDS
    for in_mask in KINDS
    for bias, dropout in ((False, True), (True, False))
]
FROZEN = ("weight", "bias", "out_mask", "in_mask")
BACKENDS = [name for name, missing in available_backends("cpu").items() if missing is None and name != "reference"]


def slice_of(tensors, **options):
    frozen = {name: tensors[name].detach() for name in FROZEN if name in tensors}
    return KeptSlice(**frozen, **options)


def call_of(tensors, kept, scaling, backend="auto"):
    trained = {name: tensor for name, tensor in tensors.items() if name not in FROZEN}
    return kept_lora_linear(**trained, kept=kept, scaling=scaling, backend=backend)


def run(shape, tensors, backend="auto", **options):
    """y and the gradients of what can have one; the factor norms give the error rule all the results it knows."""
    y = call_of(tensors, slice_of(tensors, **options), shape.scaling, backend)
    norms = definition.factor_norms(tensors["lora_a"], tensors["lora_b"])
    return with_gradients((y, *norms), {name: tensor for name, tensor in tensors.items() if name not in FROZEN})


def assert_error_rule(got, shape, tensors):
    """A slice is frozen: the definition's own gradients of weight and bias stand in for those it does not compute."""
    plain = with_gradients(unfused(shape, tensors), tensors)
    assert_as_good_as_unfused(plain | got, shape, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", COMBINATIONS, ids=str)
def test_error_is_no_worse_than_unfused(shape, dtype):
    tensors = operands(shape, dtype)
    assert_error_rule(run(shape, tensors, pad_to=8), shape, tensors)


def assert_same_bits(shape, tensors, backend, **options):
    """A backend differs in who gathers, so that its results are those of the reference to the bit."""
    expected = run(shape, tensors, "reference", **options)
    for name, value in run(shape, tensors, backend, **options).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", COMBINATIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_to_the_bit(backend, shape, dtype):
    assert_same_bits(shape, operands(shape, dtype), backend, pad_to=8)


@pytest.mark.parametrize("pad_to", [1, 8, 32, 64])
@pytest.mark.parametrize("shape", COMBINATIONS, ids=str)
def test_equals_masked_lora_linear(shape, pad_to):
    tensors = operands(shape, torch.float64)
    got = run(shape, tensors, pad_to=pad_to)
    y = masked_lora_linear(**tensors, scaling=shape.scaling)
    norms = definition.factor_norms(tensors["lora_a"], tensors["lora_b"])
    expected = with_gradients((y, *norms), tensors)
    assert expected.keys() - got.keys() == {"d weight"} | ({"d bias"} if shape.bias else set())
    for name, value in got.items():
        assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("shape", COMBINATIONS, ids=str)
def test_gradcheck(shape):
    small = replace(shape, m=3, n=6, k=7, rank=2)
    tensors = operands(small, torch.float64)
    kept = slice_of(tensors, pad_to=1)
    trained = {name: tensor for name, tensor in tensors.items() if name not in FROZEN}

    def call(*values):
        return kept_lora_linear(**dict(zip(trained, values, strict=True)), kept=kept, scaling=small.scaling)

    assert torch.autograd.gradcheck(call, tuple(trained.values()))


shapes = st.builds(
    Shape,
    m=st.sampled_from([1, 5, 33]),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    rank=st.sampled_from([1, 8, 16, 64]),
    out_mask=st.sampled_from(KINDS),
    in_mask=st.sampled_from(KINDS),
    bias=st.booleans(),
    dropout=st.booleans(),
    scaling=st.sampled_from([0.25, 1.0, 2.0]),
)


@given(
    shape=shapes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    pad_to=st.sampled_from([1, 7, 32]),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_any_shape(shape, dtype, pad_to):
    tensors = operands(shape, dtype)
    assert_error_rule(run(shape, tensors, pad_to=pad_to), shape, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_changes_no_bit(dtype):
    """On small integers every order of summation is exact, so that slices of any padding must agree to the bit."""
    shape = replace(BOTH, scaling=2.0)
    tensors = {
        name: tensor if tensor.dtype == torch.bool else (tensor.detach() * 1.5).round().clamp(-1, 1).requires_grad_()
        for name, tensor in operands(shape, dtype).items()
    }
    expected = with_gradients(unfused(shape, tensors), tensors)
    for pad_to in (1, 3, 8, 32):
        for name, value in run(shape, tensors, pad_to=pad_to).items():
            assert torch.equal(value, expected[name]), (name, pad_to)


@pytest.mark.parametrize("pad_to", [1, 32])
def test_removed_weights_and_inputs_are_never_read(pad_to):
    tensors = operands(BOTH, torch.float32)
    tensors["in_mask"][0] = tensors["out_mask"][0] = False
    expected = run(BOTH, tensors, pad_to=pad_to)
    with torch.no_grad():
        tensors["weight"][~tensors["out_mask"]] = torch.nan
        tensors["weight"][:, ~tensors["in_mask"]] = torch.nan
        tensors["bias"][~tensors["out_mask"]] = torch.nan
        if pad_to == 1:  # a side that is no narrower when padded is multiplied whole
            tensors["x"][:, ~tensors["in_mask"]] = torch.nan
    for name, value in run(BOTH, tensors, pad_to=pad_to).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("out_mask", "in_mask"), [("hard", None), (None, "hard"), ("hard", "hard")])
def test_work_is_that_of_the_slice(out_mask, in_mask):
    shape = replace(BOTH, m=8, n=96, k=128, rank=4, dropout=False, out_mask=out_mask, in_mask=in_mask)
    tensors = operands(shape, torch.float32)
    kept = slice_of(tensors, pad_to=16)
    widths = [
        size if mask is None else -(-(int(tensors[mask].sum()) + 1) // 16) * 16
        for size, mask in ((shape.n, out_mask and "out_mask"), (shape.k, in_mask and "in_mask"))
    ]
    assert widths != [shape.n, shape.k]
    with FlopCounterMode(display=False) as counter:
        call_of(tensors, kept, 1.0).sum().backward()
    # Of the adapter's six products the counter does not see the two that are accumulated in place.
    base, lora = 2 * widths[0] * widths[1], 2 * shape.rank * (shape.n + shape.k)
    assert counter.get_total_flops() == 2 * shape.m * (base + lora)


def test_padding_never_widens_the_work():
    tensors = operands(replace(BOTH, dropout=False), torch.float32)
    with FlopCounterMode(display=False) as padded:
        call_of(tensors, slice_of(tensors, pad_to=64), 1.0)
    with FlopCounterMode(display=False) as whole:
        call_of(tensors, KeptSlice(tensors["weight"].detach()), 1.0)
    assert padded.get_total_flops() == whole.get_total_flops()


def test_a_slice_holds_its_weight_from_its_first_use():
    tensors = operands(replace(BOTH, bias=False), torch.float32)
    held, other = (slice_of(tensors) for _ in range(2))
    before = call_of(tensors, held, 1.0)
    tensors["weight"].data.zero_()  # which torch does not count as a change
    adapter = tensors["lora_input"] @ tensors["lora_a"].T @ tensors["lora_b"].T
    assert torch.equal(call_of(tensors, held, 1.0), before)
    assert_close(call_of(tensors, other, 1.0), adapter)


def test_counts_are_those_of_the_masks():
    tensors = operands(BOTH, torch.float32)
    kept = slice_of(tensors)
    assert (kept.kept_out, kept.kept_in) == (int(tensors["out_mask"].sum()), int(tensors["in_mask"].sum()))
    assert (kept.out_features, kept.in_features) == (BOTH.n, BOTH.k)
    whole = KeptSlice(tensors["weight"].detach(), out_mask=torch.ones(BOTH.n, dtype=torch.bool))
    assert (whole.kept_out, whole.kept_in) == (BOTH.n, BOTH.k)


def test_leading_dimensions_and_non_contiguous_inputs():
    tensors = operands(BOTH, torch.float64)
    expected = unfused(BOTH, tensors)[0]
    strided = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in tensors.items()}
    strided["weight"] = tensors["weight"].t().contiguous().t()
    for name in ("x", "lora_input"):
        strided[name] = strided[name].reshape(4, 3, -1).transpose(0, 1)
    y = call_of(strided, slice_of(strided, pad_to=8), BOTH.scaling)
    assert_close(y.transpose(0, 1).reshape(12, -1), expected)
    y.sum().backward()
    assert tensors["x"].grad.shape == (12, BOTH.k)
    grads = torch.autograd.grad(expected.sum(), [tensors["x"], tensors["lora_input"]])
    assert_close((tensors["x"].grad, tensors["lora_input"].grad), grads)


def test_uninitialised_memory_is_never_read():
    tensors = operands(BOTH, torch.float32)
    expected = run(BOTH, tensors, pad_to=8)
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    try:
        got = run(BOTH, tensors, pad_to=8)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def test_bitwise_deterministic():
    tensors = operands(BOTH, torch.bfloat16)
    first = run(BOTH, tensors, pad_to=8)
    for _ in range(9):
        again = run(BOTH, tensors, pad_to=8)
        assert all(torch.equal(value, first[name]) for name, value in again.items())


def test_only_what_is_needed_is_kept():
    tensors = operands(replace(BOTH, dropout=False), torch.float32)
    kept = slice_of(tensors)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        call_of(tensors, kept, 1.0)
        assert sorted(saved) == sorted([*(tensors[n].shape for n in ("x", "lora_a", "lora_b")), torch.Size((12, 4))])
        saved.clear()
        for name in ("lora_a", "lora_b"):
            tensors[name].requires_grad_(False)
        call_of(tensors, kept, 1.0)
    assert sorted(saved) == sorted(tensors[n].shape for n in ("lora_a", "lora_b"))


@pytest.mark.parametrize("wanted", ["x", "lora_a", "lora_b", "lora_input"])
def test_each_gradient_alone(wanted):
    tensors = operands(BOTH, torch.float32)
    kept = slice_of(tensors)
    (expected,) = torch.autograd.grad(call_of(tensors, kept, 1.0).square().sum(), tensors[wanted])
    alone = {name: tensor if name == wanted else tensor.detach() for name, tensor in tensors.items()}
    (grad,) = torch.autograd.grad(call_of(alone, kept, 1.0).square().sum(), tensors[wanted])
    assert torch.equal(grad, expected)


def test_autocast_casts_everything():
    tensors = operands(BOTH, torch.float32)
    kept = slice_of(tensors)
    before = call_of(tensors, kept, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = call_of(tensors, kept, 1.0)
    cast = {name: tensor if tensor.dtype == torch.bool else tensor.bfloat16() for name, tensor in tensors.items()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, call_of(cast, slice_of(cast), 1.0))
    y.float().sum().backward()
    trained = [tensor for name, tensor in tensors.items() if name not in FROZEN]
    assert all(tensor.grad.dtype == torch.float32 for tensor in trained)
    assert torch.equal(call_of(tensors, kept, 1.0), before), "a slice used in bfloat16 loses no precision for later"


def test_fits_its_own_masks_only():
    tensors = operands(BOTH, torch.float32)
    out_mask, in_mask = tensors["out_mask"], tensors["in_mask"]
    kept = slice_of(tensors)
    assert kept.fits(out_mask.clone(), in_mask)
    assert not kept.fits(~out_mask, in_mask) and not kept.fits(out_mask, ~in_mask)
    assert not kept.fits(None, in_mask) and not kept.fits(out_mask, None)
    assert KeptSlice(WEIGHT).fits(None, None) and not KeptSlice(WEIGHT).fits(torch.ones(20) > 0, None)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    tensors = operands(replace(BOTH, n=52, dropout=False), torch.float64)
    kept = slice_of(tensors, pad_to=8)
    factors = tensors["lora_a"], tensors["lora_b"]

    def block(x):
        return kept_lora_linear(kept_lora_linear(x, kept, *factors, scaling=1.0).tanh(), kept, *factors, scaling=2.0)

    leaves = [tensors["x"], *factors]
    plain = torch.autograd.grad(block(tensors["x"]).square().sum(), leaves)
    checkpoint(block, tensors["x"], use_reentrant=use_reentrant).square().sum().backward()
    for leaf, grad in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_second_backward_with_retain_graph():
    tensors = operands(BOTH, torch.float32)
    leaves = [tensor for name, tensor in tensors.items() if name not in FROZEN]
    y = call_of(tensors, slice_of(tensors), 1.0)
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused():
    tensors = operands(BOTH, torch.float32)
    y = call_of(tensors, slice_of(tensors), 1.0)
    (grad,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|once_differentiable"):
        grad.sum().backward()


WEIGHT = torch.ones(20, 28)
BAD_SLICES = [
    ({"weight": torch.ones(28)}, "weight must be a 2-D floating tensor"),
    ({"weight": torch.ones(20, 28).requires_grad_()}, "weight requires a gradient and a slice is frozen"),
    ({"bias": torch.ones(20).requires_grad_()}, "bias requires a gradient"),
    ({"bias": torch.ones(3)}, r"bias has shape \[3\] on cpu, but weight \[20, 28\] needs \[20\]"),
    ({"out_mask": torch.ones(20)}, "out_mask is torch.float32: a slice takes a bool mask"),
    ({"in_mask": torch.ones(20, dtype=torch.bool)}, r"in_mask has shape \[20\]"),
    ({"out_mask": torch.ones(20, dtype=torch.bool, device="meta")}, "out_mask has shape .* on meta"),
    ({"pad_to": 0}, "pad_to is 0"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_SLICES)
def test_a_wrong_slice_is_one_clear_sentence(changed, message):
    with pytest.raises(ValueError, match=message):
        KeptSlice(**{"weight": WEIGHT, **changed})


BAD_CALLS = [
    ({"x": torch.ones(3, 4)}, r"x has shape \[3, 4\], but the weight \[20, 28\]"),
    ({"x": torch.ones(12, 28).bfloat16()}, "the slice is torch.float32 and x is torch.bfloat16: cast one of them"),
    ({"x": torch.ones(12, 28, dtype=torch.int64)}, "x is torch.int64: give a floating tensor"),
    ({"lora_a": torch.ones(28)}, r"lora_a has shape \[28\], but the weight needs \[r, 28\]"),
    ({"lora_b": torch.ones(20, 3)}, r"lora_b has shape \[20, 3\]"),
    ({"lora_input": torch.ones(11, 28)}, r"lora_input has shape \[11, 28\]"),
    ({"lora_a": torch.ones(4, 28, device="meta")}, "lora_a is on meta and the slice on cpu"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_CALLS)
def test_a_wrong_call_is_one_clear_sentence(changed, message):
    given = {"x": torch.ones(12, 28), "lora_a": torch.ones(4, 28), "lora_b": torch.ones(20, 4)}
    with pytest.raises(ValueError, match=message):
        kept_lora_linear(**{**given, **changed}, kept=KeptSlice(WEIGHT), scaling=1.0)
