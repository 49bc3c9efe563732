"""Gradients of a mask of ones that nobody applies, against those of the definition's mask in float64."""

import pytest
import torch
from backends_here import backends
from torch.testing import assert_close

from atp_kernels import Projection, mask_gradient, masked_lora_swiglu
from atp_kernels.mask_gradient import aten, definition
from atp_kernels.swiglu import definition as gated

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 130, 17), (4, 2, 33, 8), (2, 7), (2, 0, 4)]
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def gradient(y, weight):
    """Of the mask, float64, where the loss is (y * weight).sum()."""
    mask = torch.ones(len(y), y.shape[-1], dtype=torch.float64, requires_grad=True)
    loss = (definition.masked(y.detach().double(), mask) * weight.double()).sum()
    return torch.autograd.grad(loss, mask)[0]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference", "reference as on a GPU"])
def test_sums_are_the_gradient_of_a_mask(backend, shape, dtype, strided, monkeypatch):
    if "GPU" in backend:
        backend = "reference"
        monkeypatch.setattr(aten, "IN_TURN", ())
    torch.manual_seed(0)
    y = torch.randn(*shape[:-1], 2 * shape[-1] if strided else shape[-1], dtype=dtype)
    y = (y[..., ::2] if strided else y).requires_grad_()
    weight = torch.randn(shape, dtype=dtype)
    before = torch.randn(len(y), 2 * shape[-1])
    sums = before.clone()[:, ::2] if strided else before[:, : shape[-1]].contiguous()
    expected = sums.double() + gradient(y, weight)
    result = mask_gradient(y, sums, backend=backend)
    assert torch.equal(result, y)
    (result * weight).sum().backward()
    assert torch.equal(y.grad, weight)
    assert_close(sums.double(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    if strided:
        assert torch.equal(torch.stack([sums, before[:, 1::2]], -1).flatten(1)[:, 1::2], before[:, 1::2])


def test_sums_are_wide_and_grow_with_every_pass():
    y, sums = torch.randn(2, 6, 4, requires_grad=True), torch.zeros(2, 4, dtype=torch.float64)
    for times in (1, 2):
        mask_gradient(y, sums).sum().backward()
        assert_close(sums, times * y.detach().double().sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("y", "sums", "words"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(3, 4), "shape"),
        (torch.zeros(4), torch.zeros(1, 4), "y has shape"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.bfloat16), "float32 or float64"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, requires_grad=True), "without gradient"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, device="meta"), "device"),
    ],
)
def test_refused_in_a_sentence(y, sums, words):
    with pytest.raises(ValueError, match=words):
        mask_gradient(y, sums)


def block(dtype, samples, tokens, channels=24, hidden=16, rank=4):
    torch.manual_seed(1)
    sizes = ((channels, hidden), (channels, hidden), (hidden, channels))
    linears = [
        Projection(torch.randn(n, k) * k**-0.5, torch.randn(rank, k) * 0.3, torch.randn(n, rank) * 0.3, 0.5)
        for n, k in sizes
    ]
    cast = [Projection(*(t.to(dtype) for t in p[:3]), p.scaling) for p in linears]
    x = torch.randn(samples, tokens, hidden).to(dtype).requires_grad_()
    return x, cast


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("samples", "tokens"), [(1, 70), (3, 9), (5, 1)])
@pytest.mark.parametrize("backend", backends("masked_lora_swiglu", device="cpu"))
def test_gated_sums_are_the_gradient_of_a_mask_for_each_sample(backend, samples, tokens, activation, removed):
    x, linears = block(torch.float32, samples, tokens)
    keep = torch.arange(24) % 3 > 0 if removed else None
    weight, sums = torch.randn(samples, tokens, 16), torch.ones(samples, 24)
    options = {"activation": activation} | ({"mask": keep, "mask_lora": True} if removed else {})
    y = masked_lora_swiglu(x, *linears, mask_grad=sums, backend=backend, **options)
    (y * weight).sum().backward()
    plain, _ = block(torch.float32, samples, tokens)
    (masked_lora_swiglu(plain, *linears, backend=backend, **options) * weight).sum().backward()
    assert torch.equal(x.grad, plain.grad)
    wide = [Projection(*(t.double() for t in p[:3]), p.scaling) for p in linears]
    for sample in range(samples):
        mask = torch.ones(24, dtype=torch.float64) if keep is None else keep.double()
        mask.requires_grad_()
        one = gated.masked_lora_swiglu(
            x[sample].detach().double(), *wide, activation=activation, mask=mask, mask_lora=True
        )
        (expected,) = torch.autograd.grad((one * weight[sample]).sum(), mask)
        kept = slice(None) if keep is None else keep
        assert_close(sums[sample].double()[kept] - 1, expected[kept], rtol=1e-4, atol=1e-4)


def test_gated_sums_under_a_compiler():
    x, linears = block(torch.float32, 2, 5)
    eager, compiled = torch.zeros(2, 24), torch.zeros(2, 24)
    masked_lora_swiglu(x, *linears, mask_grad=eager).sum().backward()
    torch.compile(lambda x: masked_lora_swiglu(x, *linears, mask_grad=compiled).sum(), backend="eager")(x).backward()
    assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": torch.ones(24), "mask_lora": True}, "bool mask"),
        ({"mask": torch.ones(24, dtype=torch.bool)}, "bool mask"),
        ({"mask_grad": torch.zeros(3, 24)}, "shape"),
        ({"mask_grad": torch.zeros(2, 24, dtype=torch.float16)}, "float32 or float64"),
    ],
)
def test_refused_beside_a_gated_block(options, words):
    x, linears = block(torch.float32, 2, 5)
    with pytest.raises(ValueError, match=words):
        masked_lora_swiglu(x, *linears, **({"mask_grad": torch.zeros(2, 24)} | options))
