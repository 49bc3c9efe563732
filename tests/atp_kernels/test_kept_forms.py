"""A kept slice as a whole weight with zeros: what it computes, and when a tuned table takes it."""

import copy
import pickle
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from backends_here import backends, on_device
from kept_cases import assert_error_rule, results_of, slice_of, trained
from linear_cases import Shape, operands
from tables_here import tables_in, without_extension
from torch.testing import assert_close

import atp_kernels
from atp_kernels import (
    KeptSlice,
    Projection,
    QuantizedWeight,
    kept_lora_linear,
    masked_lora_qkv,
)
from atp_kernels.linear import definition
from atp_kernels.tuning import table
from atp_kernels.tuning.table import Entry, Key

CPU = torch.device("cpu")
M, N, K, R = 12, 100, 92, 4
SHAPE = Shape(m=M, n=N, k=K, rank=R, out_mask="hard", in_mask=None)
SHAPES = (
    SHAPE,
    replace(SHAPE, out_mask=None, in_mask="hard", dropout=False),
    replace(SHAPE, in_mask="hard", bias=False),
)
EMPTY = tuple(replace(SHAPE, out_mask=outs, in_mask=ins) for outs, ins in ((None, "empty"), ("empty", "full")))


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(dtype, name) for dtype in (torch.float32, torch.bfloat16) for name in backends("kept_lora_linear", dtype)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_zeroed_is_no_worse_than_unfused(shape, dtype, backend):
    tensors = on_device(operands(shape, dtype))
    zeroed = slice_of(tensors).zeroed
    assert_error_rule(results_of(shape, tensors, zeroed, backend), shape, tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeroed_gathers_no_activation_and_cuts_nothing(shape, monkeypatch):
    tensors = operands(shape, torch.float64)
    kept = slice_of(tensors)
    expected = results_of(shape, tensors, kept)
    monkeypatch.setattr(torch, "gather", None)
    zeroed = kept.zeroed
    assert zeroed is kept.zeroed and zeroed.sides == (None, None) and kept.sides != (None, None)
    assert (zeroed.kept_out, zeroed.kept_in, zeroed.share) == (kept.kept_out, kept.kept_in, kept.share)
    weight = zeroed.weight(torch.float64)
    assert weight.shape == (N, K) and weight.count_nonzero() == kept.kept_out * kept.kept_in
    assert_close(results_of(shape, tensors, zeroed, "reference"), expected)


def test_a_side_that_lies_kept_first_stays_cut():
    tensors = operands(replace(SHAPE, in_mask="hard"), torch.float64)
    kept = slice_of(tensors, (False, True))
    outs, ins = kept.zeroed.sides
    assert outs is None and ins is kept.sides[1]
    assert kept.zeroed.weight(torch.float64).shape == (N, kept.in_mask.width)
    assert_close(*(kept_lora_linear(**trained(tensors), kept=each, scaling=1.0) for each in (kept, kept.zeroed)))


def test_a_changed_weight_is_noticed_by_both():
    tensors = operands(SHAPE, torch.float32)
    weight = tensors["weight"].detach()
    kept, other = (KeptSlice(weight, out_mask=tensors["out_mask"]) for _ in range(2))
    earlier = kept.zeroed
    weight.add_(1)
    for stale in (earlier, kept, other.zeroed, copy.copy(other), copy.deepcopy(other)):
        with pytest.raises(RuntimeError, match="the weight of this KeptSlice changed in place"):
            stale.weight(torch.float32)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_copies_compute_the_same(copied):
    tensors = operands(SHAPE, torch.float32)
    kept = slice_of(tensors)
    expected = results_of(SHAPE, tensors, kept)
    for each in (copied(kept), copied(kept).zeroed, copied(kept.zeroed)):
        assert_close(results_of(SHAPE, tensors, each), expected, rtol=1e-4, atol=1e-4)


# The choice


@pytest.fixture
def tuned(tmp_path):
    """Write entries (regime, way, kept) for the shape of this file into the table of this device."""
    with tables_in(tmp_path) as path:

        def write(*entries, n=N, k=K):
            keys = [(Key(regime, "float32", M, n, k, R, kept), way) for regime, way, kept in entries]
            table.write(path, CPU, [Entry(key, way, None, {way: 1.0}) for key, way in keys])
            return path

        yield write


def taken(kept, tensors, shape=SHAPE, **options):
    """Whether a call took the whole weight, after its result was compared with the definition's."""
    kept = copy.copy(kept)
    kept._zeroed = None
    y = kept_lora_linear(**trained(tensors), kept=kept, scaling=shape.scaling, **options)
    exact = definition.masked_lora_linear(**tensors, scaling=shape.scaling)
    assert_close(y.float(), exact.float(), rtol=1e-1, atol=1e-1)
    return kept._zeroed is not None


@pytest.mark.parametrize(("shape", "regime"), list(zip(SHAPES, (*table.KEPT, None), strict=True)), ids=str)
def test_the_table_of_the_side_decides(tuned, shape, regime):
    tensors = operands(shape, torch.float32)
    kept = slice_of(tensors)
    assert not taken(kept, tensors, shape)
    for each in table.KEPT:
        tuned((each, "zeroed", kept.share), (each, "sliced", 1.0))
        path = tuned(("search", "sliced", kept.share))
        assert taken(kept, tensors, shape) == (each == regime)
        named = tensors["x"], tensors["lora_a"], tensors["lora_b"]
        explained = atp_kernels.explain("kept_lora_linear", *named, kept=kept)
        assert f"with M {M}, N {N}, K {K}, r {R} runs on" in explained
        assert (", zeroed (" in explained) == (f"the fastest for {each} in {path}" in explained) == (each == regime)
        path.unlink()
        table.tables_of.cache_clear()


def test_more_kept_than_timed_speaks_for_zeros_and_less_does_not(tuned):
    tensors = operands(SHAPE, torch.float32)
    tuned(("kept_out", "zeroed", 0.5))
    for count, expected in ((30, False), (50, True), (80, True)):
        tensors["out_mask"] = torch.arange(N) < count
        assert taken(slice_of(tensors), tensors) == expected


def test_an_entry_for_the_slice_leaves_it_as_it_is(tuned):
    tensors = operands(SHAPE, torch.float32)
    tuned(("kept_out", "sliced", 1.0))
    assert not taken(slice_of(tensors), tensors)


def test_slices_that_no_entry_is_about(tuned):
    tensors = operands(SHAPE, torch.float32)
    tuned(("kept_out", "zeroed", 0.1))
    kept = slice_of(tensors)
    assert taken(kept, tensors)
    assert not taken(kept, tensors, backend="reference")
    more = {
        name: tensor.detach().repeat(5, 1) if name in ("x", "lora_input") else tensor
        for name, tensor in tensors.items()
    }
    assert not taken(kept, more)
    assert not taken(
        slice_of(tensors | {"out_mask": torch.ones(N, dtype=torch.bool)}), tensors | {"out_mask": torch.ones(N)}
    )
    narrow = {
        name: tensor.detach().bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    assert not taken(slice_of(narrow), narrow)
    quantised = QuantizedWeight.int8(tensors["weight"].detach())
    frozen = tensors | {"weight": quantised.dequantize()}
    assert not taken(KeptSlice(quantised, tensors["bias"].detach(), out_mask=tensors["out_mask"]), frozen)
    empty = {name: tensor.detach()[:0] if name in ("x", "lora_input") else tensor for name, tensor in tensors.items()}
    assert not taken(kept, empty)


def test_explain_says_what_it_needs(tuned):
    tensors = operands(SHAPE, torch.float32)
    named = tensors["x"], tensors["lora_a"], tensors["lora_b"]
    for options in ({}, {"kept": slice_of(tensors), "colour": "red"}):
        with pytest.raises(ValueError, match="depends on beside x, lora_a and lora_b is kept: give it alone"):
            atp_kernels.explain("kept_lora_linear", *named, **options)


@pytest.mark.parametrize("shared", [False, True])
def test_linears_of_one_input_take_it_too(tuned, shared):
    """One by one, or together where the vendor's products are the backend, as on CUDA."""
    torch.manual_seed(0)
    keep, x = torch.arange(N) % 3 > 0, torch.randn(M, K)
    linears = [Projection(torch.randn(N, K), torch.randn(R, K), torch.randn(N, R), 0.1) for _ in range(3)]
    expected = [definition.masked_lora_linear(x, *linear[:3], scaling=0.1, out_mask=keep) for linear in linears]
    kept = tuple(KeptSlice(linear.weight, out_mask=keep, pad_to=8) for linear in linears)
    assert_close(masked_lora_qkv(x, *linears, kept=kept), tuple(expected), rtol=1e-4, atol=1e-4)
    assert all(slice_._zeroed is None for slice_ in kept)
    tuned(("kept_out", "zeroed", kept[0].share))
    with without_extension() if shared else nullcontext():
        assert_close(masked_lora_qkv(x, *linears, kept=kept), tuple(expected), rtol=1e-4, atol=1e-4)
    assert all(slice_._zeroed is not None for slice_ in kept)
