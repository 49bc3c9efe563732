"""The gated MLP and the three projections of attention, against their unfused definitions."""

from functools import partial

import pytest
import torch
from backends_here import backends
from block_cases import (
    FORMS,
    MLP,
    QKV,
    Case,
    assert_as_good_as,
    mlp,
    mlp_case,
    mlp_definition,
    saved_shapes,
)
from linear_cases import SEED
from torch.utils._python_dispatch import TorchDispatchMode

from atp_kernels import KeptFirst, KeptSlice, Projection, masked_lora_qkv, masked_lora_swiglu
from atp_kernels.dropout.definition import Dropout
from atp_kernels.qkv.definition import masked_lora_qkv as defined_qkv

P, SEEDS = 0.4, (SEED, 3)
DROPS = tuple(Dropout(P, seed) for seed in SEEDS)
DROPPING = pytest.mark.parametrize("dropping", [False, True])


@DROPPING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("mask", "mask_lora"), [(None, False), *FORMS])
@pytest.mark.parametrize("backend", ["auto", *backends("masked_lora_swiglu")])
def test_swiglu_is_no_worse_than_unfused(backend, mask, mask_lora, activation, frozen, dtype, dropping):
    case, options = mlp_case(mask, dtype=dtype, frozen=frozen), {"activation": activation, "mask_lora": mask_lora}
    drawn = {"dropout": P, "seeds": SEEDS} if dropping else {}
    got = case.results(mlp(case, **options, **drawn, backend=backend))
    definition = partial(mlp_definition, **options, dropouts=DROPS if dropping else (None, None))
    assert_as_good_as(definition, got, case)


@pytest.mark.parametrize("mask_lora", [False, True])
def test_swiglu_saves_no_product_and_the_decision_step_only_unmasked_sums(mask_lora):
    case = mlp_case("soft" if mask_lora else "hard", rows=(7,), bias=False, frozen=True)
    operands = {tuple(tensor.shape) for name, tensor in case.leaves.items() if name != "x"} | {(20,)}
    kept = [shape for shape in saved_shapes(lambda: mlp(case, mask_lora=mask_lora)) if shape not in operands]
    assert kept == [(7, 3), (7, 3), (7, 3), (7, 12), (7, 20), (7, 20)]
    case.freeze("lora_a", "lora_b")
    kept = [shape for shape in saved_shapes(lambda: mlp(case, mask_lora=mask_lora)) if shape not in operands]
    assert kept == [(7, 20), (7, 20)], "with LoRA frozen neither x nor an S is read in backward"


@DROPPING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scalings", [(1.7,) * 3, (1.7, 0.6, 1.3)], ids=["shared", "alone"])
@pytest.mark.parametrize(("mask", "mask_lora"), [(None, False), *FORMS])
def test_qkv_is_no_worse_than_unfused(mask, mask_lora, scalings, frozen, dtype, dropping):
    case = Case(QKV, mask=mask, dtype=dtype, frozen=frozen)

    def definition(case):
        options = {"masks": case.masks, "mask_lora": mask_lora, "dropout": DROPS[0] if dropping else None}
        return defined_qkv(case.x, *case.linears(scalings), **options)

    drawn = {"dropout": P, "seed": SEED} if dropping else {}
    options = {"masks": tuple(case.masks), "mask_lora": mask_lora, **drawn}
    got = masked_lora_qkv(case.x, *case.linears(scalings), **options)
    assert [value.shape for value in got] == [(2, 6, n) for n, _ in QKV]
    assert_as_good_as(definition, case.results(got), case)


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


def linear(n, k, r=2):
    return Projection(torch.ones(n, k), torch.ones(r, k), torch.ones(n, r), 1.0)


MASK = torch.arange(20) % 3 > 0
PAIR = [KeptSlice(torch.ones(n, k)) for n, k in MLP]
APART = [KeptSlice(torch.ones(20, 12), out_mask=KeptFirst(MASK)) for _ in range(2)]
WRONG = [
    ({"activation": "relu"}, "activation is 'relu': use one of silu, gelu_tanh"),
    ({"up": linear(19, 12)}, r"gate \[20, 12\] and up \[19, 12\] need weights of one shape"),
    ({"down": linear(12, 19)}, r"x has shape \[5, 20\], but weight \[12, 19\]"),
    ({"mask": MASK[:19]}, r"out_mask has shape \[19\]"),
    ({"kept": tuple(PAIR), "mask": MASK}, "kept slices bring their own masks"),
    ({"kept": tuple(PAIR), "mask_lora": True}, "kept slices bring their own masks"),
    ({"kept": (*APART, PAIR[2])}, "must share one mask or KeptFirst"),
    *(
        ({"dropout": 0.5, "seeds": seeds}, f"seeds has {len(seeds)} of two: give that of gate and up")
        for seeds in ((1,), (1, 2, 3))
    ),
    ({"kept": (PAIR[0], PAIR[1], PAIR[0])}, r"x has shape \[5, 20\], but the weight \[20, 12\]"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_a_wrong_block_is_one_clear_sentence(changed, message):
    given = dict(zip(("gate", "up", "down"), (linear(*shape) for shape in MLP), strict=True))
    with pytest.raises(ValueError, match=message):
        masked_lora_swiglu(torch.ones(5, 12), **{**given, **changed})
