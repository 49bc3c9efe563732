"""The LoRA step on the kept slice of the base weight, against the masked definition on the whole of it."""

from dataclasses import replace

import pytest
import torch
from backends_here import new_memory_is_nan
from block_cases import saved_shapes
from kept_cases import IN_ORDER, KINDS, ORDERS, assert_error_rule, call_of, run, slice_of
from linear_cases import Shape, operands
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from atp_kernels import KeptFirst, KeptSlice, kept_lora_linear

BOTH = Shape(m=12, n=44, k=52, out_mask="hard", in_mask="hard")
COMBINATIONS = [
    replace(BOTH, out_mask=out_mask, in_mask=in_mask, bias=bias, dropout=dropout)
    for out_mask in KINDS
    for in_mask in KINDS
    for bias, dropout in ((False, True), (True, False))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("first", [IN_ORDER, *ORDERS], ids=str)
@pytest.mark.parametrize("pad_to", [1, 7, 8, 32, 64])
@pytest.mark.parametrize("shape", COMBINATIONS, ids=str)
def test_error_is_no_worse_than_unfused(shape, pad_to, first, dtype):
    tensors = operands(shape, dtype)
    assert_error_rule(run(shape, tensors, first=first, pad_to=pad_to), shape, tensors)


@pytest.mark.parametrize(("pad_to", "first"), [(1, IN_ORDER), (32, IN_ORDER), (8, (True, True))])
def test_removed_weights_and_inputs_are_never_read(pad_to, first):
    tensors = operands(BOTH, torch.float32)
    tensors["in_mask"][0] = tensors["out_mask"][0] = False
    expected = run(BOTH, tensors, pad_to=pad_to, first=first)
    with torch.no_grad():
        tensors["weight"][~tensors["out_mask"]] = torch.nan
        tensors["weight"][:, ~tensors["in_mask"]] = torch.nan
        tensors["bias"][~tensors["out_mask"]] = torch.nan
        if pad_to == 1:  # a side that is no narrower when padded is multiplied whole
            tensors["x"][:, ~tensors["in_mask"]] = torch.nan
    assert_close(run(BOTH, tensors, pad_to=pad_to, first=first), expected, rtol=0, atol=0)


@pytest.mark.parametrize("first", ORDERS)
def test_uninitialised_memory_is_never_read(first):
    tensors = operands(BOTH, torch.float32)
    expected = run(BOTH, tensors, first=first)
    with new_memory_is_nan():
        assert_close(run(BOTH, tensors, first=first), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("out_mask", "in_mask"), [("hard", None), (None, "hard"), ("hard", "hard")])
def test_work_is_that_of_the_slice(out_mask, in_mask):
    shape = replace(BOTH, m=8, n=96, k=128, rank=4, dropout=False, out_mask=out_mask, in_mask=in_mask)
    tensors = operands(shape, torch.float32)
    kept = slice_of(tensors, pad_to=16)
    widths = [
        size if mask is None else -(-(int(tensors[mask].sum()) + 1) // 16) * 16
        for size, mask in ((shape.n, out_mask and "out_mask"), (shape.k, in_mask and "in_mask"))
    ]
    assert widths != [shape.n, shape.k]
    with FlopCounterMode(display=False) as counter:
        call_of(tensors, kept, 1.0).sum().backward()
    # Of the adapter's six products the counter does not see the two that are accumulated in place.
    base, lora = 2 * widths[0] * widths[1], 2 * shape.rank * (shape.n + shape.k)
    assert counter.get_total_flops() == 2 * shape.m * (base + lora)


def test_padding_never_widens_the_work():
    tensors = operands(replace(BOTH, dropout=False), torch.float32)
    with FlopCounterMode(display=False) as padded:
        call_of(tensors, slice_of(tensors, pad_to=64), 1.0)
    with FlopCounterMode(display=False) as whole:
        call_of(tensors, KeptSlice(tensors["weight"].detach()), 1.0)
    assert padded.get_total_flops() == whole.get_total_flops()


def test_a_slice_holds_its_weight_from_its_first_use():
    tensors = operands(replace(BOTH, bias=False), torch.float32)
    held, other = (slice_of(tensors) for _ in range(2))
    before = call_of(tensors, held, 1.0)
    tensors["weight"].data.zero_()  # which torch does not count as a change
    adapter = tensors["lora_input"] @ tensors["lora_a"].T @ tensors["lora_b"].T
    assert torch.equal(call_of(tensors, held, 1.0), before)
    assert_close(call_of(tensors, other, 1.0), adapter)


def test_only_what_is_needed_is_kept():
    tensors = operands(replace(BOTH, dropout=False), torch.float32)
    kept = slice_of(tensors)
    factors = [tensors[name] for name in ("lora_a", "lora_b")]
    needed = [tuple(tensor.shape) for tensor in (tensors["x"], *factors)]
    assert saved_shapes(lambda: call_of(tensors, kept, 1.0)) == sorted([*needed, (12, 4)])
    for factor in factors:
        factor.requires_grad_(False)
    assert saved_shapes(lambda: call_of(tensors, kept, 1.0)) == sorted(needed[1:])


def test_fits_its_own_masks_only():
    tensors = operands(BOTH, torch.float32)
    out_mask, in_mask = tensors["out_mask"], tensors["in_mask"]
    kept = slice_of(tensors)
    assert kept.fits(out_mask.clone(), in_mask)
    assert not kept.fits(~out_mask, in_mask) and not kept.fits(out_mask, ~in_mask)
    assert not kept.fits(None, in_mask) and not kept.fits(out_mask, None)
    assert (kept.kept_out, kept.kept_in) == (int(out_mask.sum()), int(in_mask.sum()))
    first = slice_of(tensors, (True, False))
    assert first.fits(KeptFirst(out_mask.clone()), in_mask)
    assert not first.fits(out_mask, in_mask) and not first.fits(KeptFirst(~out_mask), in_mask)
    assert KeptSlice(WEIGHT).fits(None, None) and not KeptSlice(WEIGHT).fits(torch.ones(20) > 0, None)


WEIGHT = torch.ones(20, 28)
BAD_SLICES = [
    ({"weight": torch.ones(28)}, "weight must be a 2-D floating tensor"),
    ({"weight": torch.ones(20, 28).requires_grad_()}, "weight requires a gradient and a slice is frozen"),
    ({"bias": torch.ones(20).requires_grad_()}, "bias requires a gradient"),
    ({"bias": torch.ones(3)}, r"bias has shape \[3\] on cpu, but weight \[20, 28\] needs \[20\]"),
    ({"out_mask": torch.ones(20)}, "out_mask is torch.float32: a slice takes a bool mask"),
    ({"in_mask": torch.ones(20, dtype=torch.bool)}, r"in_mask has shape \[20\]"),
    ({"out_mask": torch.ones(20, dtype=torch.bool, device="meta")}, "out_mask has shape .* on meta"),
    ({"pad_to": 0}, "pad_to is 0"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_SLICES)
def test_a_wrong_slice_is_one_clear_sentence(changed, message):
    with pytest.raises(ValueError, match=message):
        KeptSlice(**{"weight": WEIGHT, **changed})


BAD_CALLS = [
    ({"x": torch.ones(3, 4)}, r"x has shape \[3, 4\], but the weight \[20, 28\]"),
    ({"x": torch.ones(12, 28).bfloat16()}, "the slice is torch.float32 and x is torch.bfloat16: cast one of them"),
    ({"x": torch.ones(12, 28, dtype=torch.int64)}, "x is torch.int64: give a floating tensor"),
    ({"lora_a": torch.ones(28)}, r"lora_a has shape \[28\], but the weight needs \[r, 28\]"),
    ({"lora_b": torch.ones(20, 3)}, r"lora_b has shape \[20, 3\]"),
    ({"lora_input": torch.ones(11, 28)}, r"lora_input has shape \[11, 28\]"),
    ({"lora_a": torch.ones(4, 28, device="meta")}, "lora_a is on meta and the slice on cpu"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_CALLS)
def test_a_wrong_call_is_one_clear_sentence(changed, message):
    given = {"x": torch.ones(12, 28), "lora_a": torch.ones(4, 28), "lora_b": torch.ones(20, 4)}
    with pytest.raises(ValueError, match=message):
        kept_lora_linear(**{**given, **changed}, kept=KeptSlice(WEIGHT), scaling=1.0)
