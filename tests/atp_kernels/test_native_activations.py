"""act(gate) * up and its gradients in C++, against their closed form in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_kernels import extension
from atp_kernels.swiglu import aten, native

pytestmark = pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))

DTYPES = [torch.float32, torch.bfloat16]
# Subnormal exponentials and subnormal results have fewer digits.
TINY = 1e-40


ACTIVATIONS = ["silu", "gelu_tanh"]


def exact(d_h, gate, up, activation):
    """act(gate) * up, its gradients of gate and up, and the size of what the first of these adds up; float64.

    Last what the sigmoid is of: gate, or a cubic in it.
    """
    d_h, gate, up = (value.double() for value in (d_h, gate, up))
    z, z_slope = gate, torch.ones_like(gate)
    if activation == "gelu_tanh":
        twice = 2 * math.sqrt(2 / math.pi)
        z, z_slope = twice * (gate + 0.044715 * gate**3), twice * (1 + 3 * 0.044715 * gate**2)
    sigmoid, rest = z.sigmoid(), z.neg().sigmoid()
    change = gate * z_slope * rest
    slope, size = sigmoid * (1 + change), sigmoid * (1 + change.abs())
    return gate * sigmoid * up, d_h * up * slope, d_h * gate * sigmoid, (d_h * up * size).abs(), z


def computed(d_h, gate, up, activation="silu", in_place=False):
    d_h = d_h.clone(memory_format=torch.preserve_format)
    before = d_h.clone()
    d_gate, d_up = (d_h if in_place else torch.empty_like(d_h)), torch.empty_like(d_h)
    h = native.gated(activation, gate, up)
    native.gated_backward(activation, d_h, gate, up, d_gate, d_up)
    assert in_place or torch.equal(d_h, before)
    return h, d_gate, d_up


def assert_close_to_exact(results, operands, activation="silu"):
    h, d_gate, d_up, size, z = exact(*operands, activation)
    dtype = operands[0].dtype
    # A few units of float32, then half a unit of what the result is rounded to. Where the sigmoid is of a cubic z that
    # was rounded itself, a unit in z is |z| units in a sigmoid that falls as exp(z).
    units = 3 if activation == "silu" else 4 + 2 * z.neg().clamp(0, 120)
    relative = units * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
    for value, want, scale in zip(results, (h, d_gate, d_up), (h.abs(), size, d_up.abs()), strict=True):
        assert value.dtype == dtype
        assert ((value.double() - want).abs() <= relative * scale + TINY).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_a_few_units_over_the_whole_range(dtype, activation):
    gate = torch.cat([torch.linspace(-130, 130, 40001), torch.linspace(-2, 2, 40001)]).to(dtype).view(2, -1)
    gate = torch.cat([gate, torch.logspace(-38, 38, gate.shape[1]).to(dtype)[None]])
    ones, factors = torch.ones_like(gate), torch.linspace(0.5, 2, gate.numel()).to(dtype).view(gate.shape)
    for operands in ((ones, gate, ones), (factors, gate, factors.flip(0))):
        assert_close_to_exact(computed(*operands, activation), operands, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits(dtype, activation):
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([[inf, -inf, 3e38, -3e38, 0.0, -0.0, 1e-45, nan, -nan]]).to(dtype)
    for gate in (values, values.repeat(1, 9)):
        ones = torch.ones_like(gate)
        h, d_gate, d_up = (result[:, -9:] for result in computed(ones, gate, ones, activation))
        assert torch.equal(h[0, :6], torch.tensor([inf, 0, 3e38, 0, 0, 0]).to(dtype))
        assert torch.equal(d_gate[0, :7], torch.tensor([1, 0, 1, 0, 0.5, 0.5, 0.5]).to(dtype))
        assert torch.equal(d_up[:, :7], h[:, :7])
        assert all(result[0, 7:].isnan().all() for result in (h, d_gate, d_up))


@given(
    rows=st.sampled_from([0, 1, 3, 70]),
    cols=st.sampled_from([1, 7, 8, 31, 32, 33, 64, 131, 600]),
    dtype=st.sampled_from(DTYPES),
    apart=st.booleans(),
    in_place=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_any_shape_with_rows_that_lie_apart_or_not(rows, cols, dtype, apart, in_place, activation):
    rng = torch.Generator().manual_seed(rows + cols)
    gate, up = (4 * torch.randn(rows, 2 * cols, generator=rng)).to(dtype).chunk(2, dim=1)
    d_h = torch.randn(rows, cols, generator=rng).to(dtype)
    if not apart:
        gate, up = gate.contiguous(), up.contiguous()
    assert_close_to_exact(computed(d_h, gate, up, activation, in_place), (d_h, gate, up), activation)
    both = torch.full((rows, 2 * cols + 1), 9.0, dtype=dtype)
    d_gate, d_up = both[:, :cols], both[:, cols:-1]
    native.gated_backward(activation, d_h.clone(), gate, up, d_gate, d_up)
    assert all(map(torch.equal, (d_gate, d_up), computed(d_h, gate, up, activation)[1:]))
    assert (both[:, -1] == 9).all()


def test_ties_are_rounded_to_even():
    gate = torch.tensor([131.0, 133.0] * 33, dtype=torch.bfloat16).view(2, 33)  # silu is the identity so far out
    h = native.gated("silu", gate, torch.full_like(gate, 1.5))
    assert torch.equal(h.float(), torch.tensor([196.0, 200.0] * 33).view(2, 33))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_columns_that_lie_apart_are_those_of_the_aten(activation):
    d_h, gate, up = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    for operands in ((d_h.t(), gate.t(), up.t()),):
        assert torch.equal(native.gated(activation, *operands[1:]), aten.gated(activation, *operands[1:]))
        results = []
        for module in (native, aten):
            grads = [torch.empty_like(operands[0]) for _ in range(2)]
            module.gated_backward(activation, operands[0].clone(), *operands[1:], *grads)
            results.append(grads)
        assert all(map(torch.equal, *results))


def large_problem(dtype):
    rng = torch.Generator().manual_seed(3)
    gate, up = (40 * torch.randn(700, 2002, generator=rng)).to(dtype).chunk(2, dim=1)
    return torch.randn(700, 1001, generator=rng).to(dtype), gate, up


def test_wrong_input_is_one_sentence():
    ops, gate = torch.ops.atp_kernels_native, torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="gate must be float32 or bfloat16"):
        ops.swiglu_forward(gate.double(), gate.double())
    with pytest.raises(RuntimeError, match="gate must be 2-D with contiguous rows"):
        ops.swiglu_forward(gate.t(), gate.t())
    with pytest.raises(RuntimeError, match="up and gate must agree in shape and dtype"):
        ops.swiglu_forward(gate, gate.bfloat16())
    with pytest.raises(RuntimeError, match="d_up must have contiguous rows"):
        ops.swiglu_backward(gate, gate, gate, gate, torch.ones(4, 3).t())
