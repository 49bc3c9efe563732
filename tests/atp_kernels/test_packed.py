"""Packed linears against the definition in float64: no worse than the linears one by one, and never stale."""

import pytest
import torch
from torch.nn.functional import silu
from torch.testing import assert_close

from atp_kernels import Projection, extension, masked_lora_linear, masked_lora_swiglu
from atp_kernels.linear import definition
from atp_kernels.packed import PackedLinears, refuses
from atp_kernels.packed.op import packed_linears, packed_mlp


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


pytestmark = pytest.mark.skipif(extension.REASON is not None, reason=str(extension.REASON))


def linear(n, k, r=4, scaling=1.7, bias=False, seed=0):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=rng)  # noqa: E731
    a, b = torch.nn.Parameter(0.3 * draw(r, k)), torch.nn.Parameter(0.3 * draw(n, r))
    return Projection(draw(n, k) * k**-0.5, a, b, scaling, draw(n) if bias else None)


def factors(linears):
    return [factor for p in linears for factor in (p.lora_a, p.lora_b)]


def gradients(y, weight, inputs):
    return torch.autograd.grad((y.double() * weight).sum(), inputs)


def errors(found, exact):
    return [float((f.double() - e).norm() / e.norm().clamp_min(1e-9)) for f, e in zip(found, exact, strict=True)]


def no_worse(packed, apart, exact):
    """Within a rounding of bfloat16 of the exact ones, or not far beyond what the linears one by one are."""
    for ours, theirs in zip(errors(packed, exact), errors(apart, exact), strict=True):
        assert ours < max(1.5 * theirs, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 7, 16), (70, 16)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(4,), (4, 1, 8)], ids=str)
def test_linears_of_one_input(ranks, bias, shape):
    linears = [linear(10 + 3 * i, 16, r, bias=bias and i != 1, seed=i) for i, r in enumerate(ranks)]
    x = torch.randn(shape).to(torch.bfloat16).requires_grad_()
    pack = PackedLinears(linears)
    y = packed_linears(x, pack, linears)
    weight = torch.randn(*shape[:-1], sum(pack.sizes), dtype=torch.float64)
    inputs = [x, *factors(linears)]
    found = [y, *gradients(y, weight, inputs)]
    assert all(grad.dtype == given.dtype for grad, given in zip(found[1:], inputs, strict=True))
    apart = [
        masked_lora_linear(
            x, p.weight.bfloat16(), p.lora_a.bfloat16(), p.lora_b.bfloat16(), scaling=p.scaling,
            bias=None if p.bias is None else p.bias.bfloat16(),
        )
        for p in linears
    ]  # fmt: skip
    theirs = torch.cat(apart, -1)
    wide = x.detach().double().requires_grad_()
    exact = [[t.detach().double().requires_grad_() for t in (p.lora_a, p.lora_b)] for p in linears]
    true = torch.cat(
        [
            definition.masked_lora_linear(
                wide, p.weight.double(), *own, scaling=p.scaling, bias=None if p.bias is None else p.bias.double()
            )
            for p, own in zip(linears, exact, strict=True)
        ],
        -1,
    )
    learned = [wide, *(t for own in exact for t in own)]
    no_worse(found, [theirs, *gradients(theirs, weight, inputs)], [true, *gradients(true, weight, learned)])


@pytest.mark.parametrize("observed", [False, True])
def test_a_gated_mlp(observed):
    gate, up, down = linears = [linear(24, 16, seed=1), linear(24, 16, seed=2), linear(16, 24, seed=3)]
    x = torch.randn(3, 9, 16).to(torch.bfloat16).requires_grad_()
    sums, other = (torch.zeros(3, 24) if observed else None for _ in range(2))
    y = packed_mlp(x, PackedLinears([gate, up]), PackedLinears([down]), linears, sums)
    weight, inputs = torch.randn(3, 9, 16, dtype=torch.float64), [x, *factors(linears)]
    found = [y, *gradients(y, weight, inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = masked_lora_swiglu(x, *linears, mask_grad=other)
    apart = [theirs, *gradients(theirs, weight, inputs)]
    wide = x.detach().double().requires_grad_()
    exact = [[t.detach().double().requires_grad_() for t in (p.lora_a, p.lora_b)] for p in linears]
    g, u = (definition.masked_lora_linear(wide, p.weight.double(), *own, scaling=p.scaling)
            for p, own in zip(linears[:2], exact[:2], strict=True))  # fmt: skip
    true = definition.masked_lora_linear(silu(g) * u, down.weight.double(), *exact[2], scaling=down.scaling)
    no_worse(found, apart, [true, *gradients(true, weight, [wide, *(t for own in exact for t in own)])])
    if observed:
        assert_close(sums, other, rtol=3e-2, atol=3e-2 * float(other.abs().max()))


def test_factors_are_read_anew_in_every_pass():
    one = linear(8, 16)
    pack, x = PackedLinears([one]), torch.randn(5, 16)
    before = packed_linears(x, pack, [one])
    with torch.no_grad():
        one.lora_b.mul_(-2)
    assert not torch.equal(packed_linears(x, pack, [one]), before)
    assert torch.equal(packed_linears(x, pack, [one]), packed_linears(x, PackedLinears([one]), [one]))


def test_a_gradient_after_a_change_of_the_factors_is_refused():
    one = linear(8, 16)
    y = packed_linears(torch.randn(5, 16), PackedLinears([one]), [one])
    with torch.no_grad():
        one.lora_b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_other_weights_and_ranks_are_not_held():
    one, other = linear(8, 16), linear(8, 16, r=3)
    pack = PackedLinears([one])
    assert pack.holds([one]) and not pack.holds([other]) and not pack.holds([one, one])
    with torch.no_grad():
        one.weight.mul_(2)
    assert not pack.holds([one])


def test_extreme_factors_are_cast_as_torch_casts_them():
    one = linear(3, 16, r=2, scaling=1.0)
    values = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-40, 3.0e38, 1 + 2**-8, 1 + 3 * 2**-8])
    with torch.no_grad():
        one.lora_a.copy_(values.repeat(4).view(2, 16))
    pack = PackedLinears([one])
    packed_linears(torch.zeros(1, 16), pack, [one])
    assert_close(pack.down, one.lora_a.detach().bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(pack.weight[:, 16:], one.lora_b.detach().bfloat16())


@pytest.mark.parametrize(
    ("linears", "words"),
    [
        ([linear(8, 16)._replace(weight=torch.zeros(8, 16, dtype=torch.bfloat16))], "float32"),
        ([linear(8, 16)._replace(weight=torch.zeros(8, 16, requires_grad=True))], "frozen"),
        ([linear(8, 16)._replace(lora_a=torch.zeros(16, 4).t())], "contiguous"),
        ([linear(8, 16), linear(8, 16, scaling=2.0)], "one scaling"),
        ([linear(8, 16), linear(8, 12)], "one input"),
    ],
)
def test_what_cannot_be_packed_is_told(linears, words):
    assert words in refuses(linears)
    with pytest.raises(ValueError, match=words):
        PackedLinears(linears)


def test_nothing_in_nothing_out():
    one = linear(8, 16)
    x = torch.zeros(0, 16, requires_grad=True)
    packed_linears(x, PackedLinears([one]), [one]).sum().backward()
    assert x.grad.shape == (0, 16) and not one.lora_a.grad.any()
