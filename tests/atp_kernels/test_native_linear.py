"""The native backend around the linear's matrix products: masks, column sums and dropout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repeats import assert_repeats

from atp_kernels import extension
from atp_kernels.dropout.definition import Dropout
from atp_kernels.dropout.definition import dropped as defined_dropped
from atp_kernels.linear import aten, native

pytestmark = pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))

DTYPES = [torch.float32, torch.bfloat16]
common = settings(max_examples=40, derandomize=True, deadline=None)
matrices = st.tuples(
    st.sampled_from([0, 1, 5, 64, 65, 200]), st.sampled_from([1, 7, 8, 29, 64, 131]), st.sampled_from(DTYPES)
)


def matrix(case, seed=0, strided=False):
    rows, cols, dtype = case
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.t().contiguous().t() if strided else values


def mask_of(case, hard):
    mask = torch.rand(case[1], generator=torch.Generator().manual_seed(9))
    return mask < 0.6 if hard else mask


@common
@given(matrices, st.booleans(), st.booleans())
def test_masks_are_those_of_the_primitives_to_the_last_bit(case, hard, strided):
    values, mask = matrix(case, strided=strided), mask_of(case, hard)
    expected = aten.masked(values, mask)
    assert torch.equal(native.masked(values, mask), expected)
    own = values.contiguous().clone()
    assert native.mask_(own, mask) is own and torch.equal(own, expected)
    assert native.masked(values, None) is values and native.mask_(own, None) is own


@common
@given(matrices, st.booleans(), st.booleans())
def test_column_sums_are_as_close_to_float64_as_the_primitives(case, hard, strided):
    grad, total, mask = matrix(case, 1, strided), matrix(case, 2), mask_of(case, hard)
    exact = (grad.double() * total.double()).sum(0)
    floor = torch.finfo(torch.float32).eps * (grad.double() * total.double()).abs().sum(0)
    allowed = 2 * (aten.column_dot(grad, total) - exact).abs() + floor
    masked, sums = native.mask_and_dot(grad, total, mask)
    assert torch.equal(masked, aten.masked(grad, mask))
    assert sums.dtype == torch.float32 and torch.equal(sums, native.column_dot(grad, total))
    assert ((sums - exact).abs() <= allowed).all()


def test_column_sums_of_many_blocks_keep_small_terms():
    """A block of 64 rows is summed in float32, the blocks in float64: 2^24 + 1 is no float32."""
    left = torch.zeros(64 * 1001, 9)
    left[0], left[64::64] = 2.0**24, 1.0
    expected, ones = torch.full((9,), 2.0**24 + 1000), torch.ones_like(left)
    assert torch.equal(native.column_dot(left, ones), expected)
    assert torch.equal(native.mask_and_dot(left, ones, ones[0])[1], expected)


@common
@given(matrices, st.sampled_from([0.0, 0.1, 0.5, 0.999]), st.sampled_from([0, -1, 2**32 + 7, 2**63, -(2**63)]))
def test_dropout_is_the_definition_to_the_last_bit(case, p, seed):
    values = matrix(case)
    assert torch.equal(native.dropped(values, Dropout(p, seed)), defined_dropped(values, Dropout(p, seed)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_run_or_the_threads(dtype):
    case = (700, 1000, dtype)
    grad, total, mask = matrix(case, 1), matrix(case, 2), mask_of(case, False)

    def everything():
        fused = native.mask_and_dot(grad, total, mask)
        return [*fused, native.masked(grad, mask), native.dropped(grad, Dropout(0.1, 5))]

    assert_repeats(everything)


def test_wrong_input_is_one_sentence():
    values = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="values must be float32 or bfloat16"):
        native.masked(values.double(), torch.ones(4))
    with pytest.raises(RuntimeError, match="bool vector of length 4"):
        native.masked(values, torch.ones(3))
    with pytest.raises(RuntimeError, match="must agree in shape and dtype"):
        native.column_dot(values, torch.ones(3, 5))
    with pytest.raises(RuntimeError, match="values must be 2-D and contiguous"):
        native.mask_(values.t(), torch.ones(3))
