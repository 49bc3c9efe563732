"""The Triton kernels: natively on a GPU, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from backends_here import DEVICE, new_memory_is_nan, on_device
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    SEED,
    Shape,
    assert_as_good_as_unfused,
    every_combination,
    operands,
    shapes,
    with_gradients,
)
from torch.testing import assert_close

from atp_kernels import masked_lora_linear, triton_runtime
from atp_kernels.dropout.definition import Dropout, dropped

if not triton_runtime.AVAILABLE:
    pytest.skip(triton_runtime.REASON, allow_module_level=True)

from kernel_linear import FACTOR, run

from atp_kernels.dropout import triton as dropout_launcher
from atp_kernels.linear import triton as launcher
from atp_kernels.linear.tiles import GemmConfig, reduce_config, row_splits

# Small tiles, so that small shapes have several of them with ragged edges in every direction.
TILE = GemmConfig(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2)
ONE_PASS = replace(TILE, one_pass=True, block_n=32)
SMALL = Shape(m=19, n=23, k=35, rank=5)
COMBINATIONS = every_combination(SMALL)


@pytest.mark.parametrize("config", [TILE, ONE_PASS], ids=["split", "one-pass"])
@pytest.mark.parametrize("shape", COMBINATIONS, ids=str)
def test_every_combination_in_float32(shape, config):
    tensors = on_device(operands(shape, torch.float32))
    assert_as_good_as_unfused(run(shape, tensors, config), shape, tensors)


@pytest.mark.parametrize("shape", every_combination(replace(SMALL, p=0.4)), ids=str)
def test_every_combination_with_dropout(shape):
    """The definition's bits, drawn in S, dA and dx: one word that differs is an error hundreds of times the limit."""
    tensors = on_device(operands(shape, torch.float32))
    assert_as_good_as_unfused(run(shape, tensors, TILE), shape, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**31, SEED])
def test_dropout_kernel_gives_the_definition_in_every_bit(seed, dtype):
    x = torch.rand(37, 523, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype).t().contiguous().t()
    for p in (0.1, 0.75):
        dropout = Dropout(p, seed)
        assert torch.equal(dropout_launcher.dropped(x, dropout), dropped(x, dropout))
    assert dropout_launcher.dropped(x[:0], dropout).shape == (0, 523)


@pytest.mark.parametrize("config", [TILE, ONE_PASS], ids=["split", "one-pass"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_lora", [False, True])
@pytest.mark.parametrize(("dropout", "p"), [(False, 0.0), (True, 0.0), (False, 0.4)])
def test_half_precision(dtype, config, mask_lora, dropout, p):
    shape = Shape(m=19, n=23, k=35, rank=8, mask_lora=mask_lora, dropout=dropout, p=p)
    tensors = on_device(operands(shape, dtype))
    assert_as_good_as_unfused(run(shape, tensors, config), shape, tensors, FACTOR[dtype])


SHAPES = shapes(
    m=st.sampled_from([1, 16, 20]), n=st.integers(1, 40), k=st.integers(1, 40),
    rank=st.sampled_from([1, 8, 16, 64, 128]),
)  # fmt: skip


@given(shape=SHAPES, dtype=st.sampled_from([torch.float32, torch.float16]), one_pass=st.booleans())
@settings(max_examples=15, derandomize=True, deadline=None)
def test_any_shape(shape, dtype, one_pass):
    tensors = on_device(operands(shape, dtype))
    assert_as_good_as_unfused(run(shape, tensors, ONE_PASS if one_pass else TILE), shape, tensors, 2.0)


@pytest.mark.parametrize(("mask_lora", "p"), [(False, 0.0), (True, 0.0), (True, 0.3)])
@pytest.mark.parametrize("sizes", [dict(m=70, n=150, k=140), dict(m=150, n=40, k=300)], ids=str)
def test_tiles_of_the_table_through_the_public_function(sizes, mask_lora, p):
    shape = Shape(**sizes, rank=8, mask_lora=mask_lora, p=p)
    tensors = on_device(operands(shape, torch.float32))
    y = masked_lora_linear(**tensors, **shape.options, backend="triton")
    assert_as_good_as_unfused(with_gradients((y,), tensors), shape, tensors)


@pytest.mark.parametrize(("config", "p"), [(TILE, 0.0), (ONE_PASS, 0.0), (TILE, 0.4)], ids=str)
def test_nothing_is_read_outside_the_operands_or_before_it_is_written(config, p):
    shape = Shape(m=19, n=23, k=35, rank=3, mask_lora=True, p=p)
    tensors = on_device(operands(shape, torch.float32))
    expected = run(shape, tensors, config)

    def padded(tensor):
        """The same values inside a buffer of NaN: an out-of-bounds read shows in the result."""
        if not tensor.is_floating_point():
            return tensor
        buffer = torch.full([size + 40 for size in tensor.shape], torch.nan, device=DEVICE)
        inside = buffer[tuple(slice(20, 20 + size) for size in tensor.shape)]
        return inside.copy_(tensor.detach()).requires_grad_()

    with new_memory_is_nan():
        got = run(shape, {name: padded(tensor) for name, tensor in tensors.items()}, config)
    assert_close(got, expected, rtol=0, atol=0)


def test_64_bit_offsets_give_the_same_result(monkeypatch):
    shape = Shape(m=19, n=23, k=35, rank=3, p=0.4)
    tensors = on_device(operands(shape, torch.float32))
    expected = run(shape, tensors, TILE)
    monkeypatch.setattr(triton_runtime, "_INT32_LIMIT", 1)
    assert_close(run(shape, tensors, TILE), expected, rtol=0, atol=0)


def far_apart(tensor):
    """The same values in rows that lie so far apart that the last ones begin beyond 2**31 elements."""
    step = 2**31 // (tensor.shape[0] - 1) + 1
    storage = torch.empty(step * tensor.shape[0], dtype=tensor.dtype, device=tensor.device)  # pages are taken when used
    return storage.as_strided(tensor.shape, (step, 1)).copy_(tensor.detach()).requires_grad_()


def columns_far_apart(tensor):
    return far_apart(tensor.t()).t().detach().requires_grad_()


ROWS = Shape(m=300, n=300, k=5, rank=2, mask_lora=True)
COLUMNS = Shape(m=5, n=7, k=300, rank=2, dropout=False)


@pytest.mark.parametrize(
    ("shape", "config", "names", "apart"),
    [
        (ROWS, replace(TILE, block_m=128, block_n=128), ("x", "lora_input", "weight", "lora_b"), far_apart),
        (ROWS, replace(ONE_PASS, block_m=128, block_n=128), ("x", "lora_input", "weight", "lora_b"), far_apart),
        (COLUMNS, replace(TILE, block_k=128), ("x",), columns_far_apart),
    ],
    ids=["split", "one-pass", "columns"],
)
def test_offsets_past_32_bits(shape, config, names, apart):
    """test_offsets.py says that each of these operands alone asks for them."""
    tensors = on_device(operands(shape, torch.float16))
    expected = run(shape, tensors, config)
    assert_close(run(shape, tensors | {name: apart(tensors[name]) for name in names}, config), expected, rtol=0, atol=0)


def test_unmasked_calls_and_empty_batches_go_to_the_vendor_gemm():
    plain, masked = Shape(out_mask=None, in_mask=None), Shape()
    unfit = replace(masked, m=0), replace(masked, n=0), replace(masked, rank=200)
    for shape, pays in ((plain, False), (masked, True), *((shape, False) for shape in unfit)):
        t = operands(shape, torch.float32)
        masks = t.get("out_mask"), t.get("in_mask")
        assert launcher._fusion_pays(t["x"], t["weight"], t["lora_a"], *masks) is pays


def test_without_masks_dropout_goes_beside_the_vendor_gemm():
    shape = replace(SMALL, out_mask=None, in_mask=None, p=0.4)
    tensors = on_device(operands(shape, torch.float32))
    y = masked_lora_linear(**tensors, **shape.options, backend="triton")
    assert_as_good_as_unfused(with_gradients((y,), tensors), shape, tensors)


def test_row_splits_cover_all_rows_and_depend_on_shapes_alone():
    config = reduce_config(16, torch.bfloat16)
    for m in (1, 63, 257, 8192):
        splits = row_splits(m, 4096, config)
        assert splits * -(-m // splits) >= m and splits <= 4
