"""RMSNorm with a dtype of its own for the result, on every backend that has it, against float64."""

import pytest
import torch
from backends_here import backends
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_kernels import add_rms_norm, explain, extension, rms_norm
from atp_kernels.norm import definition, native

BACKENDS = [name for name in backends("rms_norm", device="cpu") if name != "triton"]  # see test_norm_triton.py
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
EPS = 1e-5


def problem(rows, cols, dtype, result, scale=1.0, seed=0):
    """x, weight and an upstream gradient."""
    rng = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(rows, cols, generator=rng)).to(dtype).requires_grad_()
    weight = (torch.rand(cols, generator=rng) + 0.5).requires_grad_()
    return x, weight, torch.randn(rows, cols, generator=rng).to(result)


def plain(x, weight, result):
    """As transformers' Llama does it: float32 inside, rounded to the dtype of x, times the weight."""
    wide = x.float()
    return (weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)).to(result)


def results(y, x, weight, grad):
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def assert_as_good_as(plain, got, x, weight, d_y, eps, factor=2.0):
    """Errors of y, d_x and d_weight are at most `factor` times those of plain PyTorch, or one rounding."""
    wide, wide_weight = (tensor.double().requires_grad_() for tensor in (x, weight))
    exact = results(definition.rms_norm(wide, wide_weight, eps), wide, wide_weight, d_y.double())
    # What cancels in d_x is a term of this size; what cancels in d_weight are the rows.
    scales = (wide.detach().square().mean(1, keepdim=True) + eps).rsqrt()
    term = (wide_weight * d_y.double()).detach() * scales
    sizes = exact[0], term, (d_y.double() * wide.detach() * scales).abs().sum(0)
    for value, other, truth, size in zip(got, plain, exact, sizes, strict=True):
        assert value.dtype == other.dtype and value.shape == other.shape
        error, own = ((some.double() - truth).norm() for some in (value, other))
        allowed = factor if value.dtype == torch.bfloat16 else 2.0
        assert error <= max(allowed * own, torch.finfo(value.dtype).eps * size.norm())


def test_the_definition_is_torchs_own():
    """Also where eps is most of the scale."""
    for scale in (1.0, 1e-3):
        x, weight, output = (tensor.detach().double() for tensor in problem(5, 12, torch.float64, torch.float64, scale))
        expected = torch.nn.functional.rms_norm(x, (12,), weight, EPS)
        torch.testing.assert_close(definition.rms_norm(x, weight, EPS), expected, rtol=1e-12, atol=0)
        stream, normed = definition.add_rms_norm(x, output, weight, EPS, 0.22)
        torch.testing.assert_close(stream, torch.add(x, output, alpha=0.22), rtol=1e-12, atol=1e-15)
        expected = torch.nn.functional.rms_norm(stream, (12,), weight, EPS)
        torch.testing.assert_close(normed, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    rows=st.sampled_from([1, 3, 70]),
    cols=st.sampled_from([1, 7, 8, 9, 31, 64, 1023, 1024, 1025, 5000]),
    pair=st.sampled_from(PAIRS),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
)
@settings(max_examples=50, derandomize=True, deadline=None)
def test_error_is_no_worse_than_unfused(backend, rows, cols, pair, scale):
    x, weight, grad = problem(rows, cols, *pair, scale)
    got = results(rms_norm(x, weight, eps=EPS, dtype=pair[1], backend=backend), x, weight, grad)
    unfused = results(plain(x, weight, pair[1]), x, weight, grad)
    assert_as_good_as(unfused, got, x.detach(), weight.detach(), grad, EPS)


def test_gradcheck_and_other_dtypes():
    x, weight, _ = problem(4, 6, torch.float64, torch.float64)
    weight = weight.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=EPS), (x, weight))
    assert rms_norm(x, weight, eps=EPS, dtype=torch.float32).dtype == torch.float32
    half = rms_norm(x.half(), weight.half(), eps=EPS)
    torch.testing.assert_close(half, definition.rms_norm(x, weight, EPS).half(), rtol=2e-3, atol=2e-3)
    narrow = rms_norm(x.float(), weight.float(), eps=EPS, dtype=torch.float16)
    assert narrow.dtype == torch.float16
    upstream = torch.linspace(-1, 1, x.numel()).view(x.shape).half()
    (d_x,) = torch.autograd.grad(narrow, x, upstream)
    torch.testing.assert_close(
        d_x, torch.autograd.grad(definition.rms_norm(x, weight, EPS), x, upstream.double())[0], rtol=1e-5, atol=1e-6
    )
    assert "reference" in explain("rms_norm", x)


def test_wrong_input_is_one_sentence():
    x, weight = torch.ones(3, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"give a floating tensor \[..., K\]"):
        rms_norm(x.long(), weight, eps=EPS)
    with pytest.raises(ValueError, match=r"give a floating tensor \[..., K\]"):
        rms_norm(x[:, :0], weight[:0], eps=EPS)
    with pytest.raises(ValueError, match=r"shape \[3\] on cpu, but x needs a floating \[4\] on cpu"):
        rms_norm(x, weight[:3], eps=EPS)
    with pytest.raises(ValueError, match="dtype is torch.int64: give a floating one"):
        rms_norm(x, weight, eps=EPS, dtype=torch.int64)


SUMS = [  # dtypes of the stream, of a block's output, and of the norm
    (torch.float32, torch.float32, None),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.bfloat16, torch.float16, torch.bfloat16),
    (torch.float64, torch.float64, torch.float64),
]


@pytest.mark.parametrize("upstream", ["both", "stream", "norm"])
@pytest.mark.parametrize("multiplier", [1.0, 0.22])
@pytest.mark.parametrize("dtypes", SUMS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_and_norm_are_the_two_steps_bit_for_bit(backend, dtypes, multiplier, upstream):
    if backend == "native" and torch.float64 in dtypes:
        pytest.skip("native takes no float64")
    rng = torch.Generator().manual_seed(3)
    x, output = (torch.randn(2, 5, 24, generator=rng).to(dtype).requires_grad_() for dtype in dtypes[:2])
    weight = (torch.rand(24, generator=rng) + 0.5).requires_grad_()
    stream = x + output * multiplier
    steps = stream, rms_norm(stream, weight, eps=EPS, dtype=dtypes[2], backend=backend)
    given = {"eps": EPS, "multiplier": multiplier, "dtype": dtypes[2], "backend": backend}
    found = add_rms_norm(x, output, weight, **given)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, steps, strict=True))
    upstreams = [torch.randn(y.shape, generator=rng).to(y.dtype) for y in steps]
    which = {"both": slice(2), "stream": slice(1), "norm": slice(1, 2)}[upstream]
    leaves = [x, output, *([weight] if upstream != "stream" else [])]
    for some in (leaves, *([leaf] for leaf in leaves)):
        expected = torch.autograd.grad(steps[which], some, upstreams[which], retain_graph=True)
        got = torch.autograd.grad(found[which], some, upstreams[which], retain_graph=True)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradients_of_x_and_output_do_not_share_memory_where_both_are_leaves():
    x, output = (torch.ones(2, 3, 4).requires_grad_() for _ in range(2))
    stream, normed = add_rms_norm(x, output, torch.ones(4), eps=EPS)
    (stream.sum() + normed.square().sum()).backward()
    assert torch.equal(x.grad, output.grad)
    x.grad.zero_()
    assert output.grad.all()


def test_gradcheck_of_sum_and_norm():
    x, weight, output = problem(4, 6, torch.float64, torch.float64)
    leaves = x, output.requires_grad_(), weight.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, o, w: add_rms_norm(x, o, w, eps=EPS, multiplier=0.5), leaves)


def test_what_does_not_fit_the_sum_is_one_sentence():
    x, weight = torch.ones(3, 4), torch.ones(4)
    for bad in (x[:1], x.long(), x.to("meta")):
        with pytest.raises(ValueError, match=r"output is .*, but x needs a floating \[3, 4\] on cpu"):
            add_rms_norm(x, bad, weight, eps=EPS)
    with pytest.raises(ValueError, match="multiplier is nan: give a finite number"):
        add_rms_norm(x, x, weight, eps=EPS, multiplier=float("nan"))
    with pytest.raises(ValueError, match=r"shape \[3\] on cpu, but x needs a floating \[4\] on cpu"):
        add_rms_norm(x, x, weight[:3], eps=EPS)


@pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))
class TestNative:
    @staticmethod
    def everything():
        tensors = []
        for dtype, result in PAIRS:
            for cols in (37, 576, 4099):
                x, weight, grad = problem(50, cols, dtype, result)
                y, scales = native.forward(x.detach(), weight, EPS, result)
                tensors += [y, scales, native.input_grad(grad, x.detach(), weight, scales)]
        return tensors

    def test_wrong_input_is_one_sentence(self):
        ops, x, weight = torch.ops.atp_kernels_native, torch.ones(3, 4), torch.ones(4)
        with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
            ops.rms_norm_forward(x.double(), weight, EPS, False)
        with pytest.raises(RuntimeError, match="weight must be a contiguous float32 vector of length 4"):
            ops.rms_norm_forward(x, torch.ones(3), EPS, False)
        with pytest.raises(RuntimeError, match=r"d_y must be contiguous \[3, 4\]"):
            ops.rms_norm_backward(torch.ones(4, 3), x, weight, torch.ones(3))
        with pytest.raises(RuntimeError, match="scales must be a contiguous float32 vector of length 3"):
            ops.rms_norm_backward(x, x, weight, torch.ones(4))
