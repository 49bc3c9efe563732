"""Packed linears against the definition in float64: no worse than the linears one by one, and never stale."""

import pytest
import torch
from torch.nn.functional import gelu, silu
from torch.testing import assert_close

from atp_kernels import Projection, extension, masked_lora_linear, masked_lora_swiglu, rms_norm
from atp_kernels.linear import definition
from atp_kernels.packed import PackedLinears, refuses
from atp_kernels.packed.op import packed_attention, packed_linears, packed_mlp


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
    return torch.autograd.grad((y.double() * weight).sum(), inputs, retain_graph=True)


def errors(found, exact):
    return [float((f.double() - e).norm() / e.norm().clamp_min(1e-9)) for f, e in zip(found, exact, strict=True)]


def no_worse(packed, apart, exact, times=1.5):
    """Within a rounding of bfloat16 of the exact ones, or not far beyond what the linears one by one are."""
    for ours, theirs in zip(errors(packed, exact), errors(apart, exact), strict=True):
        assert ours < max(times * theirs, torch.finfo(torch.bfloat16).eps)


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
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_mlp(observed, activation):
    gate, up, down = linears = [linear(24, 16, seed=1), linear(24, 16, seed=2), linear(16, 24, seed=3)]
    x = torch.randn(3, 9, 16).to(torch.bfloat16).requires_grad_()
    sums, other = (torch.zeros(3, 24) if observed else None for _ in range(2))
    y = packed_mlp(x, PackedLinears([gate, up]), PackedLinears([down]), linears, sums, gelu=activation == "gelu_tanh")
    weight, inputs = torch.randn(3, 9, 16, dtype=torch.float64), [x, *factors(linears)]
    found = [y, *gradients(y, weight, inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = masked_lora_swiglu(x, *linears, mask_grad=other, activation=activation)
    apart = [theirs, *gradients(theirs, weight, inputs)]
    wide = x.detach().double().requires_grad_()
    exact = [[t.detach().double().requires_grad_() for t in (p.lora_a, p.lora_b)] for p in linears]
    g, u = (definition.masked_lora_linear(wide, p.weight.double(), *own, scaling=p.scaling)
            for p, own in zip(linears[:2], exact[:2], strict=True))  # fmt: skip
    h = (silu(g) if activation == "silu" else gelu(g, approximate="tanh")) * u
    true = definition.masked_lora_linear(h, down.weight.double(), *exact[2], scaling=down.scaling)
    no_worse(found, apart, [true, *gradients(true, weight, [wide, *(t for own in exact for t in own)])])
    if observed:
        assert_close(sums, other, rtol=3e-2, atol=3e-2 * float(other.abs().max()))


def turned(x, cos, sin):
    """RoPE in the definition of its paper: x [batch, tokens, heads, dim]."""
    one, other = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat([-other, one], -1) * sin[:, :, None]


def attention(project, end, angles, seen, scaling, heads, groups):
    """By torch's own operations, in the dtype of what the projections give."""
    q, k, v = (part.unflatten(-1, (count, -1)) for part, count in zip(project, (heads, groups, groups), strict=True))
    q, k = (turned(part.to(angles[0].dtype), *angles).to(part.dtype) for part in (q, k))
    k, v = (part.repeat_interleave(heads // groups, 2) for part in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scaling
    unseen = torch.full((), torch.finfo(scores.dtype).min, dtype=scores.dtype)
    p = torch.where(seen, scores, unseen).softmax(-1)
    return end(torch.einsum("bhts,bshd->bthd", p, v).flatten(2))


SAMPLES = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * 7, [0, 1, 2, 3, 3, 3, 3]])  # of each token, in rows of a batch


def seen_by(kind, batch, tokens):
    """(mask as it is given, what it says)."""
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    if kind == "causal":
        return None, causal
    own = SAMPLES[:batch] if kind != "one for all rows" else SAMPLES[:1]
    if tokens != SAMPLES.shape[1]:
        drawn = torch.randint(4, (batch, tokens), generator=torch.Generator().manual_seed(0))
        own = drawn.sort(-1).values
    mask = causal & (own[:, None, :, None] == own[:, None, None, :])
    if kind == "a token that sees nothing":
        mask[0, 0, 2] = False
    return mask, mask


@pytest.mark.parametrize(
    ("kind", "batch", "tokens", "heads", "groups", "dim"),
    [
        ("causal", 3, 7, 4, 2, 8),
        ("causal", 5, 130, 8, 2, 4),  # more scores than are computed together
        ("each row its own", 5, 130, 8, 2, 4),
        ("each row its own", 3, 7, 3, 1, 10),
        ("each row its own", 1, 7, 2, 2, 18),
        ("one for all rows", 3, 7, 6, 3, 2),
        ("a token that sees nothing", 2, 7, 4, 4, 6),
    ],
)
@pytest.mark.parametrize("observed", [False, True])
def test_attention(kind, batch, tokens, heads, groups, dim, observed):
    rows = [heads * dim, groups * dim, groups * dim]
    linears = [linear(n, 16, bias=i != 1, seed=i) for i, n in enumerate(rows)] + [linear(16, rows[0], seed=4)]
    x = torch.randn(batch, tokens, 16).to(torch.bfloat16).requires_grad_()
    angle = torch.rand(1 if kind == "causal" else batch, tokens, dim // 2).repeat(1, 1, 2) * 6
    angles = angle.cos(), angle.sin()
    mask, seen = seen_by(kind, batch, tokens)
    sums = [torch.zeros(batch, n) for n in rows] if observed else None
    y = packed_attention(x, PackedLinears(linears[:3]), PackedLinears(linears[3:]), linears, angles, mask, 0.15, sums)
    weight, inputs = torch.randn(y.shape, dtype=torch.float64), [x, *factors(linears)]
    weight *= seen.any(-1).transpose(1, 2)  # nobody reads what a token has that sees nothing
    found = [y, *gradients(y, weight, inputs)]

    bf = lambda p: masked_lora_linear(  # noqa: E731
        given, p.weight.bfloat16(), p.lora_a.bfloat16(), p.lora_b.bfloat16(), scaling=p.scaling,
        bias=None if p.bias is None else p.bias.bfloat16(),
    )  # fmt: skip
    given = x
    projected = [bf(p) for p in linears[:3]]

    def end(states):
        nonlocal given
        given = states
        return bf(linears[3])

    theirs = attention(projected, end, angles, seen, 0.15, heads, groups)
    apart = [theirs, *gradients(theirs, weight, inputs)]
    wide = x.detach().double().requires_grad_()
    exact = [[t.detach().double().requires_grad_() for t in (p.lora_a, p.lora_b)] for p in linears]
    true_linear = lambda x, i: definition.masked_lora_linear(  # noqa: E731
        x, linears[i].weight.double(), *exact[i], scaling=linears[i].scaling,
        bias=None if linears[i].bias is None else linears[i].bias.double(),
    )  # fmt: skip
    outputs = [true_linear(wide, i) for i in range(3)]
    true = attention(outputs, lambda x: true_linear(x, 3), [a.double() for a in angles], seen, 0.15, heads, groups)
    learned = [wide, *(t for own in exact for t in own)]
    no_worse(found, apart, [true, *gradients(true, weight, learned)], 2)
    if observed:
        for total, output, grad in zip(sums, outputs, gradients(true, weight, outputs), strict=True):
            assert_close(total, (output * grad).sum(1).float(), rtol=3e-2, atol=3e-2 * float(total.abs().max()))


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("block", ["mlp", "attention"])
def test_a_block_with_its_norm_and_residual_connection(block, need_x):
    """Bit by bit what the norm, the block and a sum compute one after the other."""
    if block == "mlp":
        linears = [linear(24, 16, seed=1), linear(24, 16, seed=2), linear(16, 24, seed=3)]
        packs, run = (PackedLinears(linears[:2]), PackedLinears(linears[2:])), packed_mlp
        options = {"mask_grad": torch.zeros(3, 24)}
        watched = [options["mask_grad"]]
    else:
        linears = [linear(n, 16, seed=n) for n in (32, 16, 16)] + [linear(16, 32, seed=4)]
        packs, run = (PackedLinears(linears[:3]), PackedLinears(linears[3:])), packed_attention
        angle = torch.rand(1, 9, 4).repeat(1, 1, 2)
        watched = [torch.zeros(3, n) for n in (32, 16, 16)]
        options = {"angles": (angle.cos(), angle.sin()), "mask": None, "scaling": 0.3, "mask_grads": watched}
    x, weight = torch.randn(3, 9, 16, requires_grad=need_x), torch.rand(16) + 0.5
    inputs, upstream = [*([x] if need_x else []), *factors(linears)], torch.randn(3, 9, 16)

    def results(y):
        found = [y, *torch.autograd.grad((y * upstream).sum(), inputs), *(sums.clone() for sums in watched)]
        for sums in watched:
            sums.zero_()
        return found

    whole = results(run(x, *packs, linears, **options, norm=(weight, 1e-5)))
    apart = results(x + run(rms_norm(x, weight, eps=1e-5, dtype=torch.bfloat16), *packs, linears, **options))
    assert whole[0].dtype == torch.float32
    assert all(torch.equal(one, other) and one.any() for one, other in zip(whole, apart, strict=True))


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
    pack, of_another_rank = PackedLinears([one]), one._replace(lora_a=other.lora_a, lora_b=other.lora_b)
    assert pack.holds([one]) and not any(pack.holds(others) for others in ([other], [of_another_rank], [one, one]))
    with torch.no_grad():
        one.weight.mul_(2)
    assert not pack.holds([one])


def test_extreme_factors_are_cast_as_torch_casts_them():
    one = linear(3, 16, r=2, scaling=1.0)
    values = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-40, 3.0e38, 1 + 2**-8, 1 + 3 * 2**-8])
    values[3:4].view(torch.int32).fill_(0x7FFFFFFF)  # a NaN that rounding up would make a zero
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
