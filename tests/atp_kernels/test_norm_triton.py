"""RMSNorm in Triton: natively on a GPU, else in Triton's interpreter."""

import pytest
import torch
from backends_here import DEVICE, ON_GPU, new_memory_is_nan
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rms_norm import assert_as_good_as

from atp_kernels import call, explain, rms_norm, triton_runtime
from atp_kernels.norm import aten

if not triton_runtime.AVAILABLE:
    pytest.skip(triton_runtime.REASON, allow_module_level=True)

from kernel_linear import FACTOR

from atp_kernels.norm import triton as backend
from atp_kernels.norm.triton import Tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Small tiles, so that small shapes have several of them: rows that fit and rows that take several steps.
WHOLE, STEPS = Tile(4, 64, 4), Tile(2, 16, 4)
EPS = 1e-5


def problem(rows, width, dtype=torch.float32, result=None, weight_dtype=torch.float32, scale=1.0):
    """(x, weight, upstream gradient)."""
    rng = torch.Generator().manual_seed(rows + width)
    x, d_y = (torch.randn(rows, width, generator=rng).to(DEVICE) for _ in range(2))
    weight = (torch.rand(width, generator=rng) + 0.5).to(DEVICE, weight_dtype)
    return (scale * x).to(dtype), weight, d_y.to(result or dtype)


def computed(x, weight, d_y, eps=EPS, tile=None):
    """y, d_x and d_weight of the kernels."""
    y, scales = backend.forward(x, weight, eps, d_y.dtype, tile=tile)
    return y, *backend.backward(d_y, x, weight, scales, True, True, tile=tile)


def check(x, weight, d_y, eps=EPS, tile=None):
    y, scales = aten.forward(x, weight, eps, d_y.dtype)
    plain = y, *aten.backward(d_y, x, weight, scales, True, True)
    assert_as_good_as(plain, computed(x, weight, d_y, eps, tile), x, weight, d_y, eps, FACTOR[torch.bfloat16])


@given(
    rows=st.sampled_from([1, 2, 7, 33]),
    width=st.sampled_from([1, 2, 15, 16, 17, 48, 63, 64, 65, 130]),
    dtype=st.sampled_from(DTYPES),
    result=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([*DTYPES, torch.float64]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    tile=st.sampled_from([WHOLE, STEPS, None]),
)
@settings(max_examples=30, derandomize=True, deadline=None)
def test_error_is_no_worse_than_aten(rows, width, dtype, result, weight_dtype, scale, tile):
    weight_dtype = torch.float32 if weight_dtype == torch.float64 and not ON_GPU else weight_dtype
    check(*problem(rows, width, dtype, result, weight_dtype, scale), tile=tile)


@pytest.mark.parametrize("width", [576, 8193, 70001])
def test_widths_of_models_and_beyond_one_tile(width, monkeypatch):
    monkeypatch.setattr(backend, "_COLUMN_TILE", (4, 2048))  # fewer programs for the interpreter
    check(*problem(2, width, torch.float32, torch.float16))


@pytest.mark.parametrize("tile", [WHOLE, STEPS], ids=["whole", "steps"])
def test_each_gradient_alone_is_that_of_both(tile):
    x, weight, d_y = problem(19, 40)
    _, scales = backend.forward(x, weight, EPS, torch.float32, tile=tile)
    d_x, d_weight = backend.backward(d_y, x, weight, scales, True, True, tile=tile)
    only_x = backend.backward(d_y, x, weight, scales, True, False, tile=tile)
    only_weight = backend.backward(d_y, x, weight, scales, False, True, tile=tile)
    assert torch.equal(only_x[0], d_x) and only_x[1] is None
    assert only_weight[0] is None
    torch.testing.assert_close(only_weight[1], d_weight, rtol=1e-5, atol=1e-4)
    assert backend.backward(d_y, x, weight, scales, False, False, tile=tile) == (None, None)


@pytest.mark.parametrize(("programs", "rows"), [(1, 9), (2, 9), (3, 40), (5, 41)])
def test_every_row_is_added_up_once_however_many_programs_there_are(monkeypatch, programs, rows):
    monkeypatch.setattr(backend, "_PROGRAMS", programs)
    monkeypatch.setattr(backend, "_COLUMN_TILE", (2, 16))
    for tile in (WHOLE, STEPS):
        check(*problem(rows, 33), tile=tile)


def test_tiny_and_zero_rows_without_eps():
    """Scales of 1e15, and of 1 / sqrt(eps) for a row of zeros."""
    x, weight, d_y = problem(5, 48)
    tiny = 1e-15 * x
    for tile in (WHOLE, STEPS):
        check(tiny, weight, d_y, eps=0.0, tile=tile)
        small, d_small, _ = computed(1e-18 * x, weight, d_y, tile=tile, eps=0.0)
        assert small.isfinite().all() and d_small.isfinite().all()
        y, d_x, d_weight = computed(0 * x, weight, d_y, tile=tile)
        assert not y.any() and not d_weight.any()
        torch.testing.assert_close(d_x, d_y * weight / EPS**0.5)


def test_a_bad_value_stays_in_its_row():
    for bad in (torch.nan, torch.inf):
        x, weight, d_y = problem(6, 48)
        expected = computed(x, weight, d_y)
        x[2, 5] = bad
        for tile in (WHOLE, STEPS):
            y, d_x, _ = computed(x, weight, d_y, tile=tile)
            others = [0, 1, 3, 4, 5]
            torch.testing.assert_close(y[others], expected[0][others])
            torch.testing.assert_close(d_x[others], expected[1][others])
            assert y[2, 5].isnan() and d_x[2].isnan().any()


def fenced(tensor, fence=torch.nan):
    """(buffer, the same values in the middle of it): rows that lie apart, with `fence` before, between and after."""
    buffer = torch.full((tensor.shape[0] + 4, tensor.shape[1] + 150), fence, dtype=tensor.dtype, device=DEVICE)
    inside = buffer[2:-2, 70 : 70 + tensor.shape[1]]
    return buffer, inside.copy_(tensor)


@pytest.mark.parametrize("tile", [WHOLE, STEPS], ids=["whole", "steps"])
def test_nothing_is_read_outside_the_operands_or_before_it_is_written(tile):
    x, weight, d_y = problem(7, 37)
    expected = computed(x, weight, d_y, tile=tile)
    _, scales = backend.forward(x, weight, EPS, torch.float32, tile=tile)
    columns = backend.backward(d_y, x, weight, scales, False, True, tile=tile)[1]
    with new_memory_is_nan():
        x, d_y = fenced(x)[1], fenced(d_y)[1]
        weight = fenced(weight.unsqueeze(0))[1][0]
        got = computed(x, weight, d_y, tile=tile)
        fenced_scales = fenced(scales.unsqueeze(0))[1][0]
        columns_again = backend.backward(d_y, x, weight, fenced_scales, False, True, tile=tile)[1]
    assert all(map(torch.equal, (*got, columns_again), (*expected, columns)))


@given(
    rows=st.sampled_from([1, 7, 33]),
    width=st.sampled_from([1, 15, 16, 17, 48, 63, 65, 130]),
    dtypes=st.sampled_from([(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
                            (torch.float16, torch.float16), (torch.float32, torch.float32)]),
    multiplier=st.sampled_from([1.0, 0.22]),
    with_stream=st.booleans(),
    tile=st.sampled_from([WHOLE, STEPS, None]),
)  # fmt: skip
@settings(max_examples=30, derandomize=True, deadline=None)
def test_error_of_a_sum_and_its_norm_is_no_worse_than_aten(rows, width, dtypes, multiplier, with_stream, tile):
    """The norm and all gradients against float64 of the sum as it is rounded, operands in strided rows."""
    x, weight, output = problem(rows, width, dtypes[0], dtypes[1])
    d_y, d_stream = problem(rows, width, dtypes[1])[2], problem(rows + 1, width, dtypes[0])[2][:rows]
    x, output = fenced(x)[1], output.t().contiguous().t()
    stream, y, scales = backend.add_forward(x, output, weight, EPS, multiplier, dtypes[1], tile=tile)
    exact = x.double() + multiplier * output.double()
    largest = (x.double().abs() + (multiplier * output.double()).abs()).max()
    assert stream.dtype == dtypes[0] and stream.is_contiguous()
    assert (stream.double() - exact).abs().max() <= 2 * torch.finfo(dtypes[0]).eps * largest
    if multiplier == 1:
        assert ON_GPU or dtypes[0] == torch.bfloat16 or torch.equal(stream, x + output)
    _, plain_scales = aten.forward(stream, weight, EPS, dtypes[1])
    torch.testing.assert_close(scales, plain_scales)
    alone, alone_scales = backend.forward(stream, weight, EPS, dtypes[1], tile=tile)
    assert torch.equal(y, alone) and torch.equal(scales, alone_scales)

    upstream = d_stream.t().contiguous().t() if with_stream else None
    apart = None if multiplier == 1 and dtypes[0] == dtypes[1] else dtypes[1]
    given = stream, weight, scales, True, apart, multiplier, True
    got = backend.add_backward(upstream, d_y, *given, tile=tile)
    wide = [tensor.double() for tensor in (d_stream, d_y, stream, weight, scales)]
    wide = wide if with_stream else [None, *wide[1:]]
    truth = aten.add_backward(*wide, True, None if apart is None else torch.float64, multiplier, True)
    plain = aten.add_backward(upstream, d_y, *given)
    # What cancels in a gradient are terms of this size.
    term = (d_y.double() * weight.double()).abs() * scales.double().unsqueeze(1) + d_stream.double().abs()
    sizes = term, term, (d_y.double() * stream.double() * scales.double().unsqueeze(1)).abs().sum(0)
    for found, exact, own, size in zip(got, truth, plain, sizes, strict=True):
        assert (found is None) == (exact is None)
        if found is not None:
            assert found.dtype == own.dtype and found.shape == own.shape
            error, allowed = ((some.double() - exact).norm() for some in (found, own))
            factor = FACTOR[torch.bfloat16] if found.dtype == torch.bfloat16 else 2.0
            assert error <= max(factor * allowed, 2 * torch.finfo(found.dtype).eps * size.norm())


@pytest.mark.parametrize("tile", [WHOLE, STEPS], ids=["whole", "steps"])
def test_a_sum_reads_nothing_outside_its_operands(tile):
    x, weight, output = problem(7, 37)
    d_y = problem(8, 37)[2][:7]

    def run(x, output, d_stream, d_y):
        stream, y, scales = backend.add_forward(x, output, weight, EPS, 0.5, torch.float32, tile=tile)
        given = stream, weight, scales, True, torch.float32, 0.5, True
        return stream, y, scales, *backend.add_backward(d_stream, d_y, *given, tile=tile)

    expected = run(x, output, output, d_y)
    with new_memory_is_nan():
        got = run(*(fenced(tensor)[1] for tensor in (x, output, output, d_y)))
    assert all(map(torch.equal, got, expected))


def test_cuda_takes_it_unless_the_result_is_float64():
    cuda = torch.device("cuda")
    assert call.select("rms_norm", cuda, torch.float32, result=torch.float64)[1] == "reference"
    assert "reference" in explain("rms_norm", torch.ones(1, dtype=torch.float64))
    x, weight, _ = problem(3, 8)
    with pytest.raises(RuntimeError, match="the triton backend rounds to float32, float16 or bfloat16, not to float64"):
        rms_norm(x, weight, eps=EPS, dtype=torch.float64, backend="triton")
