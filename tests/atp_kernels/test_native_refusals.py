"""Raw calls of the extension with operands that are not what they say: refused, and nothing beyond them is touched."""

import pytest
import torch

from atp_kernels import extension

if not extension.AVAILABLE:
    pytest.skip(extension.REASON, allow_module_level=True)
ops = extension.ops


@pytest.mark.parametrize("pad_to", [2**62, 2**63 - 1])
def test_padding_beyond_all_memory_is_refused(pad_to):
    """A size that wraps around would be an allocation too small for what is copied into it."""
    with pytest.raises(RuntimeError):
        ops.compact(torch.randn(4, 8), None, torch.arange(8), pad_to)


def test_rows_without_columns_take_no_time():
    padded = ops.compact(torch.randn(4, 0), torch.arange(4), None, 2**50)
    assert padded.shape == (2**50, 0)


@pytest.mark.parametrize(
    "direction", [torch.zeros(64, dtype=torch.int8), torch.zeros(64, dtype=torch.float64), torch.zeros(128)[::2]],
    ids=["int8", "float64", "strided"],
)  # fmt: skip
def test_a_direction_in_other_elements_is_refused(direction):
    with pytest.raises(RuntimeError, match="direction must be"):
        ops.separate_lasso_backward(direction, [8, 8], torch.ones(()), False)


@pytest.mark.parametrize("sides", [[-1, -64], [2**62, 4], [65, 1], [2**63 - 1, 2**63 - 1]], ids=str)
def test_pieces_beyond_the_direction_are_refused(sides):
    with pytest.raises(RuntimeError, match="does not fit"):
        ops.separate_lasso_backward(torch.zeros(64), sides, torch.ones(()), False)


def test_rows_that_share_memory_are_not_written():
    """Two threads would write one row."""
    row, wide = torch.zeros(1, 8), torch.randn(4, 8)
    repeated, index = row.expand(4, 8), torch.arange(8)
    with pytest.raises(RuntimeError, match="out must have rows that share no memory"):
        ops.take_columns(wide, index, repeated)
    with pytest.raises(RuntimeError, match="values must have rows that share no memory"):
        ops.spread_columns_(repeated, 8, index)
    for place, name in ((3, "d_gate"), (4, "d_up")):
        operands = [wide, wide, wide, torch.zeros(4, 8), torch.zeros(4, 8)]
        operands[place] = repeated
        with pytest.raises(RuntimeError, match=f"{name} must have rows that share no memory"):
            ops.swiglu_backward(*operands)
    assert row.eq(0).all()
    ops.take_columns(repeated, index, torch.zeros(4, 8))  # they may be read


def test_an_empty_piece_has_any_other_side():
    (piece,) = ops.separate_lasso_backward(torch.zeros(0), [0, 1000], torch.ones(()), False)
    assert piece.shape == (0, 1000)
