"""Columns of activations in another order, in C++: taken to another tensor, or spread in place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repeats import assert_repeats

from atp_kernels import extension
from atp_kernels.kept import aten, native

pytestmark = pytest.mark.skipif(not extension.AVAILABLE, reason=str(extension.REASON))
DTYPES = [torch.int8, torch.bfloat16, torch.float32, torch.float64]


def numbered(rows, cols, dtype, apart=0):
    """Rows that differ, `apart` elements from each other."""
    values = torch.arange(rows * (cols + apart)).remainder(101).view(rows, cols + apart)
    return values.to(dtype)[:, apart:]


@given(
    rows=st.sampled_from([0, 1, 7, 300]),
    cols=st.integers(1, 150),
    index=st.lists(st.integers(0, 10**6), max_size=170),
    dtype=st.sampled_from(DTYPES),
    apart=st.sampled_from([(0, 0), (5, 3)]),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_take_is_an_exact_gather(rows, cols, index, dtype, apart):
    values = numbered(rows, cols, dtype, apart[0])
    index = torch.tensor(index, dtype=torch.int64) % cols
    whole = torch.full((rows, len(index) + apart[1]), 77).to(dtype)
    native.take_columns(values, index, whole[:, apart[1] :])
    assert torch.equal(whole[:, apart[1] :], values[:, index])
    assert (whole[:, : apart[1]] == 77).all(), "what lies between the rows is nobody's"


@given(
    rows=st.sampled_from([0, 1, 7, 300]),
    cols=st.integers(1, 150),
    width=st.integers(1, 150),
    seed=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    apart=st.sampled_from([0, 5]),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_spread_is_an_exact_gather_in_place(rows, cols, width, seed, dtype, apart):
    values, width = numbered(rows, cols, dtype, apart), min(width, cols)
    place = torch.randint(width, (cols,), generator=torch.Generator().manual_seed(seed))
    expected = values[:, place]
    native.spread_columns_(values, width, place, 1)
    assert torch.equal(values, expected)


def test_take_from_columns_and_from_one_row_repeated():
    for values in (torch.randn(6, 4).t(), torch.randn(1, 6).expand(4, -1), torch.ones(1, 1).expand(4, 6)):
        out = torch.empty(4, 3)
        native.take_columns(values, torch.tensor([5, 0, 5]), out)
        assert torch.equal(out, values[:, [5, 0, 5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_those_of_aten_on_any_number_of_threads(dtype):
    values = torch.randn(700, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    index, place = torch.arange(0, 300, 2), torch.arange(300) // 2

    def both(backend):
        taken, spread = values.new_empty(700, 150), values.clone()
        backend.take_columns(values, index, taken)
        backend.spread_columns_(spread, 150, place, 16)
        return taken, spread

    assert all(map(torch.equal, both(native), both(aten)))
    assert_repeats(lambda: both(native))


VALUES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("values", "index", "out", "message"),
    [
        (VALUES, torch.tensor([0, 4]), torch.ones(3, 2), r"index\[1\] is 4, outside \[0, 4\)"),
        (VALUES, torch.tensor([-1]), torch.ones(3, 1), r"index\[0\] is -1, outside \[0, 4\)"),
        (VALUES, torch.tensor([0]), torch.ones(3, 2), r"out must be \[3, 1\]"),
        (VALUES, torch.tensor([0]), torch.ones(2, 1), r"out must be \[3, 1\]"),
        (VALUES, torch.tensor([0]), torch.ones(3, 1).bfloat16(), "of the dtype of values"),
        (VALUES, torch.tensor([0.0]), torch.ones(3, 1), "index must be a contiguous int64 vector"),
        (torch.ones(3, 4, 2), torch.tensor([0]), torch.ones(3, 1), "values must be 2-D"),
        (VALUES, torch.tensor([0]), torch.ones(3, 1, 1), "out must be 2-D"),
        (VALUES.to(torch.complex128), torch.tensor([0]), torch.ones(3, 1).to(torch.complex128), "1, 2, 4 or 8 bytes"),
    ],
)
def test_take_refuses_in_one_sentence(values, index, out, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.atp_kernels_native.take_columns(values, index, out)


@pytest.mark.parametrize(
    ("values", "width", "place", "message"),
    [
        (VALUES, 2, torch.tensor([0, 1, 2, 0]), r"place\[2\] is 2, outside \[0, 2\)"),
        (VALUES, 2, torch.tensor([0, 1, -1, 0]), r"place\[2\] is -1, outside \[0, 2\)"),
        (VALUES, 2, torch.tensor([0, 1]), "place needs 4 entries"),
        (VALUES, 5, torch.tensor([0, 1, 2, 3]), r"width lies in \[0, 4\]"),
        (VALUES, -1, torch.tensor([0, 1, 2, 3]), r"width lies in \[0, 4\]"),
        (torch.ones(4, 3).t(), 2, torch.tensor([0, 1, 1, 0]), "each row in one piece"),
    ],
)
def test_spread_refuses_in_one_sentence(values, width, place, message):
    before = values.clone()
    with pytest.raises(RuntimeError, match=message):
        native.spread_columns_(values, width, place, 1)
    assert torch.equal(values, before)
