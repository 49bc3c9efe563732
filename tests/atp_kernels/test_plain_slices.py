"""Plain calls with bool masks: where slicing pays they compute on the kept part, and say so."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import SEED, Shape, frozen, operands, shapes, unfused, with_gradients
from torch.testing import assert_close

import atp_kernels
from atp_kernels import masked_lora_linear
from atp_kernels.kept import sides
from atp_kernels.kept.slices import CallSlice
from atp_kernels.linear import definition, ways
from atp_kernels.tuning.table import Key

KINDS = (None, "hard", "empty", "full")
BOTH = Shape(m=12, n=44, k=52, out_mask="hard", in_mask="hard")
SLICED = "KeptLoraLinearBackward"


@pytest.fixture(autouse=True)
def slicing_always_pays(monkeypatch):
    for name, value in (("FEWEST_ROWS", 1), ("LARGEST_SHARE", 1.0), ("LEAST_SAVED", 0)):
        monkeypatch.setattr(ways, name, value)


def call(shape, tensors, **options):
    return masked_lora_linear(**frozen(tensors), scaling=shape.scaling, **options)


def taken(y):
    return y.grad_fn.name()


SHAPES = shapes(
    out_mask=st.sampled_from(KINDS), in_mask=st.sampled_from(KINDS[1:]), mask_lora=st.just(False), p=st.just(0.0),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_equals_the_definition(shape, seed):
    tensors = operands(shape, torch.float64, seed)
    expected = with_gradients(unfused(shape, tensors)[:1], tensors)
    leaves = {name: each for name, each in tensors.items() if name not in ("weight", "bias")}
    y = call(shape, tensors)
    assert taken(y) == SLICED
    for name, value in with_gradients((y,), leaves).items():
        assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize(
    "change",
    [
        {"out_mask": torch.rand(44, requires_grad=True)},
        {"in_mask": torch.rand(52)},
        {"weight": torch.randn(44, 52, requires_grad=True)},
        {"bias": torch.randn(44, requires_grad=True)},
    ],
    ids=["soft with a gradient", "soft", "weight trains", "bias trains"],
)
def test_what_a_slice_cannot_do_is_not_sliced(change):
    tensors = frozen(operands(replace(BOTH, dropout=False, bias=False), torch.float32)) | change
    y = masked_lora_linear(**tensors, scaling=1.0)
    assert taken(y) == "MaskedLoraLinearBackward"
    exact = definition.masked_lora_linear(**tensors, scaling=1.0)
    (name,) = change
    assert_close(y, exact)
    if tensors[name].requires_grad:
        expected, got = (torch.autograd.grad(each.square().sum(), tensors[name])[0] for each in (exact, y))
        assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"mask_lora": True}, {"dropout": 0.5, "seed": SEED}, {"backend": "reference"}],
    ids=lambda options: next(iter(options)),
)
def test_calls_of_another_kind_are_not_sliced(options):
    tensors = operands(replace(BOTH, dropout=False), torch.float32)
    assert taken(call(BOTH, tensors, **options)) == "MaskedLoraLinearBackward"


def test_a_frozen_parameter_under_no_grad_is_sliced_all_the_same():
    tensors = operands(replace(BOTH, dropout=False), torch.float32)
    with torch.no_grad():
        y = masked_lora_linear(**tensors, scaling=1.7)
        explained = atp_kernels.explain(
            "masked_lora_linear", *(tensors[name] for name in ("x", "weight", "lora_a", "lora_b")),
            out_mask=tensors["out_mask"], bias=tensors["bias"],
        )  # fmt: skip
    assert_close(y, definition.masked_lora_linear(**tensors, scaling=1.7))
    assert "runs on sliced" in explained


def test_strided_operands_and_masks():
    shape = replace(BOTH, dropout=False)
    tensors = operands(shape, torch.float64)
    expected = call(shape, tensors)
    strided = {
        name: torch.stack([each.detach()] * 2, -1)[..., 0].requires_grad_(each.requires_grad)
        for name, each in tensors.items()
    }
    assert not any(each.is_contiguous() for each in strided.values())
    y = call(shape, strided)
    assert taken(y) == SLICED
    assert_close(y, expected)
    rows = tensors["x"].detach().reshape(4, 3, -1).transpose(0, 1)
    assert_close(call(shape, tensors | {"x": rows}).transpose(0, 1).reshape(12, -1), expected)
    kept = torch.tensor([True]).expand(shape.n)
    assert_close(call(shape, tensors | {"out_mask": kept}), call(shape, tensors | {"out_mask": kept.clone()}))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(weight_dtype):
    shape = replace(BOTH, dropout=False)
    tensors = operands(shape, torch.float32)
    tensors["weight"] = tensors["weight"].detach().to(weight_dtype)
    leaves = {name: tensors[name] for name in ("x", "lora_a", "lora_b")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(shape, tensors)
        whole = call(shape, tensors, backend="reference")
    assert taken(y) == SLICED and y.dtype == torch.bfloat16
    expected = with_gradients((whole,), leaves)
    for name, value in with_gradients((y,), leaves).items():
        assert value.dtype == expected[name].dtype
        assert_close(value, expected[name], rtol=0.05, atol=0.1, msg=name)


def test_nothing_of_the_weight_is_held_between_the_passes():
    tensors = operands(replace(BOTH, dropout=False), torch.float32)
    y = call(BOTH, tensors)
    kept = y.grad_fn.kept
    assert isinstance(kept, CallSlice) and kept._held is None
    y.sum().backward(retain_graph=True)
    first = tensors["x"].grad.clone()
    y.sum().backward()
    assert torch.equal(tensors["x"].grad, 2 * first)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_changes_before_the_backward_pass_is_refused_there(name):
    tensors = operands(replace(BOTH, dropout=False), torch.float32)
    y = call(BOTH, tensors)
    tensors[name].detach().add_(1.0)
    with pytest.raises(RuntimeError, match=f"the {name} of a masked LoRA linear changed in place before its backward"):
        y.sum().backward()


def test_a_call_reads_weight_and_masks_as_they_are_now():
    shape = replace(BOTH, dropout=False)
    tensors = operands(shape, torch.float64)
    call(shape, tensors)
    tensors["weight"].data.mul_(2.0)  # which torch does not count
    tensors["out_mask"].data.logical_not_()
    assert_close(call(shape, tensors), definition.masked_lora_linear(**tensors, scaling=shape.scaling))


@pytest.mark.parametrize("changed", [False, True])
def test_an_unchanged_mask_is_looked_at_once_where_that_waits(monkeypatch, changed):
    """Whatever is asked of a mask on a GPU goes through `remembered`."""
    looks = []
    monkeypatch.setattr(sides.Gather, "of", lambda mask, pad_to: looks.append(mask) or None)
    mask = torch.rand(20) < 0.5
    sides.remembered(mask, 32)
    if changed:
        mask[0] = ~mask[0]
    sides.remembered(mask, 32)
    assert len(looks) == 1 + changed
    sides.remembered(mask, 64)
    assert len(looks) == 2 + changed
    with torch.inference_mode():
        uncounted = torch.rand(20) < 0.5
    sides.remembered(uncounted, 32)
    sides.remembered(uncounted, 32)
    assert len(looks) == 4 + changed


def test_a_mask_that_is_gone_is_forgotten():
    before = len(sides._REMEMBERED)
    mask = torch.rand(20) < 0.5
    gather = sides.remembered(mask, 32)
    assert len(sides._REMEMBERED) == before + 1
    assert sides.remembered(mask, 32) is gather
    del mask
    assert len(sides._REMEMBERED) == before


def test_a_slice_by_remembered_masks_is_the_same(monkeypatch):
    tensors = operands(replace(BOTH, dropout=False), torch.float64)
    expected = call(BOTH, tensors)
    monkeypatch.setattr(CallSlice, "_gather_of", lambda self, mask, pad_to: sides.remembered(mask, pad_to))
    for _ in range(2):
        assert torch.equal(call(BOTH, tensors), expected)


@pytest.mark.parametrize(
    ("limits", "rows", "share", "runs_on"),
    [
        ({}, 12, 0.5, "sliced"),
        ({"FEWEST_ROWS": 13}, 12, 0.5, "whole"),
        ({"LARGEST_SHARE": 0.5}, 12, 0.5, "sliced"),
        ({"LARGEST_SHARE": 0.49}, 12, 0.5, "whole"),
        ({"LEAST_SAVED": 12 * 44 * 52 // 2}, 12, 0.5, "sliced"),
        ({"LEAST_SAVED": 12 * 44 * 52 // 2 + 1}, 12, 0.5, "whole"),
    ],
)
def test_explain_says_which_way_and_the_call_goes_it(monkeypatch, limits, rows, share, runs_on):
    for name, value in limits.items():
        monkeypatch.setattr(ways, name, value)
    tensors = frozen(operands(replace(BOTH, m=rows, dropout=False, bias=False, in_mask=None), torch.float32))
    tensors["out_mask"] = torch.arange(44) < 44 * share
    named = [tensors[name] for name in ("x", "weight", "lora_a", "lora_b")]
    explained = atp_kernels.explain("masked_lora_linear", *named, out_mask=tensors["out_mask"])
    assert f"with M {rows}, N 44, K 52, r 4 runs on " in explained
    sliced = runs_on == "sliced"
    assert ("runs on sliced (masks that keep 0.50 of the weight pay" in explained) == sliced
    assert (taken(masked_lora_linear(**tensors, scaling=1.0)) == SLICED) == sliced


def test_both_masks_count():
    tensors = frozen(operands(replace(BOTH, dropout=False, bias=False), torch.float32))
    named = [tensors[name] for name in ("x", "weight", "lora_a", "lora_b")]
    masks = {"out_mask": torch.arange(44) < 33, "in_mask": torch.arange(52) < 26}
    one_each = ({name: mask} for name, mask in masks.items())
    for chosen, share in zip((masks, *one_each), ("0.38", "0.75", "0.50"), strict=True):
        assert f"masks that keep {share} of" in atp_kernels.explain("masked_lora_linear", *named, **chosen)


@pytest.mark.parametrize(("rows", "device", "sliced"), [(256, "cpu", True), (255, "cpu", False), (256, "cuda", False)])
def test_few_rows_and_a_gpu_need_a_table(monkeypatch, rows, device, sliced):
    monkeypatch.setattr(ways, "FEWEST_ROWS", 256)
    key = Key("search", "float32", rows, 44, 52, 4, 0.5)
    assert (ways.by_rule(torch.device(device), key) is not None) == sliced


def test_explain_refuses_what_decides_nothing():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="does not depend on colour"):
        atp_kernels.explain("masked_lora_linear", x, torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), colour="red")
    with pytest.raises(ValueError, match="explain nothing without x, weight, lora_a and lora_b"):
        atp_kernels.explain("compact", x, out_mask=torch.ones(4))


@pytest.mark.parametrize("context", [nullcontext, torch.inference_mode])
def test_the_rule_as_it_is(monkeypatch, context):
    monkeypatch.undo()
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 1024, generator=rng), torch.randn(1024, 1024, generator=rng) / 32
    lora_a, lora_b = torch.randn(4, 1024, generator=rng) / 32, torch.randn(1024, 4, generator=rng)
    mask = torch.arange(1024) % 3 == 0
    with context():
        y = masked_lora_linear(x, weight, lora_a, lora_b, scaling=1.0, out_mask=mask)
        explained = atp_kernels.explain("masked_lora_linear", x, weight, lora_a, lora_b, out_mask=mask)
        few = atp_kernels.explain("masked_lora_linear", x[:255], weight, lora_a, lora_b, out_mask=mask)
    assert "runs on sliced" in explained and "sliced" not in few
    assert_close(
        y, definition.masked_lora_linear(x, weight, lora_a, lora_b, scaling=1.0, out_mask=mask), atol=1e-4, rtol=1e-4
    )
