"""The gated MLP and the three projections of attention, against their unfused definitions."""

import copy
from functools import partial

import pytest
import torch
from block_cases import EQUAL, FORMS, QKV, Case, assert_as_good_as, mlp, mlp_case, mlp_definition, slices_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from atp_kernels import KeptFirst, KeptSlice, masked_lora_qkv, masked_lora_swiglu
from atp_kernels.qkv.definition import masked_lora_qkv as defined_qkv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("mask", "mask_lora"), [(None, False), *FORMS])
def test_swiglu_is_no_worse_than_unfused(mask, mask_lora, activation, frozen, dtype):
    case = mlp_case(mask, dtype=dtype, frozen=frozen)
    got = case.results(mlp(case, activation=activation, mask_lora=mask_lora))
    assert_as_good_as(partial(mlp_definition, activation=activation, mask_lora=mask_lora), got, case)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("mask", "mask_lora"), [(None, False), ("soft", True), ("soft", False), ("hard", False)])
def test_swiglu_gradcheck(mask, mask_lora, activation):
    case = mlp_case(mask, shapes=((6, 4), (6, 4), (4, 6)), dtype=torch.float64, rank=2, rows=(3,))
    scalings = (1.7, 0.6, 1.3)

    def call(*values):
        other = copy.copy(case)
        other.leaves = dict(zip(case.leaves, values, strict=True))
        other.masks = [other.leaves.get("mask 0", case.masks[0])]
        return mlp(other, scalings, activation=activation, mask_lora=mask_lora)

    assert torch.autograd.gradcheck(call, tuple(case.leaves.values()))


@given(
    rows=st.sampled_from([(1,), (5,), (2, 3)]),
    hidden=st.integers(1, 40),
    channels=st.integers(1, 70),
    rank=st.sampled_from([1, 8, 64]),
    form=st.sampled_from([(None, False), *FORMS]),
    bias=st.booleans(),
    frozen=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_swiglu_of_any_shape(rows, hidden, channels, rank, form, bias, frozen, dtype):
    shapes = ((channels, hidden), (channels, hidden), (hidden, channels))
    case = mlp_case(form[0], shapes=shapes, rows=rows, rank=rank, bias=bias, frozen=frozen, dtype=dtype)
    got = case.results(mlp(case, mask_lora=form[1]))
    assert_as_good_as(partial(mlp_definition, mask_lora=form[1]), got, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mask", ["hard", "empty", "full"])
def test_swiglu_on_kept_slices_is_no_worse_than_unfused(mask, first, dtype):
    case = mlp_case(mask, frozen=True, dtype=dtype)
    kept = slices_of(case, first)
    got = case.results(masked_lora_swiglu(case.x, *case.linears(EQUAL), kept=kept))
    assert_as_good_as(mlp_definition, got, case)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_swiglu_on_kept_slices_gradcheck(activation):
    case = mlp_case("hard", shapes=((6, 4), (6, 4), (4, 6)), dtype=torch.float64, rank=2, rows=(3,), frozen=True)
    kept = slices_of(case, True, pad_to=1)
    trained = {name: tensor for name, tensor in case.leaves.items() if tensor.requires_grad}

    def call(*values):
        other = copy.copy(case)
        other.leaves = case.leaves | dict(zip(trained, values, strict=True))
        return masked_lora_swiglu(other.x, *other.linears(), activation=activation, kept=kept)

    assert torch.autograd.gradcheck(call, tuple(trained.values()))


def saved_shapes(call):
    """Shapes of the distinct tensors that autograd keeps for a call, the operands left out."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        call()
    return sorted(tuple(tensor.shape) for tensor in saved.values())


@pytest.mark.parametrize("mask_lora", [False, True])
def test_swiglu_saves_no_product_and_the_decision_step_only_unmasked_sums(mask_lora):
    case = mlp_case("soft" if mask_lora else "hard", rows=(7,), bias=False, frozen=True)
    operands = {tuple(tensor.shape) for name, tensor in case.leaves.items() if name != "x"} | {(20,)}
    kept = [shape for shape in saved_shapes(lambda: mlp(case, mask_lora=mask_lora)) if shape not in operands]
    assert kept == [(7, 3), (7, 3), (7, 3), (7, 12), (7, 20), (7, 20)]
    case.freeze("lora_a", "lora_b")
    kept = [shape for shape in saved_shapes(lambda: mlp(case, mask_lora=mask_lora)) if shape not in operands]
    assert kept == [(7, 20), (7, 20)], "with LoRA frozen neither x nor an S is read in backward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("mask", "mask_lora"), [(None, False), *FORMS])
def test_qkv_is_no_worse_than_unfused(mask, mask_lora, frozen, dtype):
    case = Case(QKV, mask=mask, dtype=dtype, frozen=frozen)

    def definition(case):
        options = {"masks": case.masks, "mask_lora": mask_lora}
        return defined_qkv(case.x, *case.linears((1.7,) * 3), **options)

    got = masked_lora_qkv(case.x, *case.linears((1.7,) * 3), masks=tuple(case.masks), mask_lora=mask_lora)
    assert [value.shape for value in got] == [(2, 6, n) for n, _ in QKV]
    assert_as_good_as(definition, case.results(got), case)


@pytest.mark.parametrize("changed", ["bias", "mask"])
def test_qkv_with_one_bias_or_one_mask(changed):
    case = Case(QKV, mask="hard", frozen=True)
    linears = case.linears((1.7,) * 3)
    if changed == "bias":
        linears[1] = linears[1]._replace(bias=None)
        masks = (None,) * 3
    else:
        masks = (None, case.masks[1], None)
    expected = defined_qkv(case.x, *linears, masks=masks)
    assert_close(masked_lora_qkv(case.x, *linears, masks=masks), expected)


@pytest.mark.parametrize("first", [True, False])
def test_qkv_on_kept_slices(first):
    case = Case(QKV, mask="hard", frozen=True)
    masks = [KeptFirst(mask) if first else mask for mask in case.masks]
    kept = tuple(KeptSlice(p.weight, p.bias, out_mask=m, pad_to=4) for p, m in zip(case.linears(), masks, strict=True))
    got = masked_lora_qkv(case.x, *case.linears(), kept=kept)
    if first:
        got = tuple(value[..., mask.place] for value, mask in zip(got, masks, strict=True))
    assert_as_good_as(lambda case: defined_qkv(case.x, *case.linears(), masks=case.masks), case.results(got), case)


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def test_qkv_makes_no_product_that_nobody_needs():
    case = Case(QKV, frozen=True)
    with _Products() as forward:
        y = torch.cat(masked_lora_qkv(case.x, *case.linears((1.0,) * 3)), -1)
    with _Products() as backward:
        y.sum().backward()
    assert (forward.count, backward.count) == (9, 15)  # S, base and adapter; P, dA, dB, base and adapter of dx
