"""No two programs of a kernel store to one place, and none loads what another stores, for random shapes."""

import random

import pytest
import torch
from backends_here import backends
from operation_cases import CASES, K, M, N, R

from atp_kernels import triton_runtime

if not (triton_runtime.AVAILABLE and triton_runtime.INTERPRETED):
    pytest.skip(triton_runtime.REASON or "kernels run on a GPU", allow_module_level=True)

import triton
import triton.language as tl
from races import watched

from atp_kernels import rms_norm
from atp_kernels.linear import tiles
from atp_kernels.norm import triton as norm

TRITON = [name for name, case in CASES.items() if "triton" in backends(case.op)]
TILED = ("linear-soft", "linear-hard", "linear-sum", "kept-first", "kept-last")
TILES = ("128x128x64", "128x128x64-one-pass", "64x128x64")
QUICK = ("linear-sum", "linear-dropout", "swiglu-gelu", "group_lasso_grad_",
         "lora_dropout", "rms_norm", "add_rms_norm", "rotary_embedding", "cross_entropy_")  # fmt: skip
KERNELS = {
    "column_reduce_kernel", "cross_entropy_kernel", "dropout_kernel", "gated_backward_kernel", "gated_kernel",
    "group_norms_kernel", "lora_down_kernel", "masked_lora_descriptor_kernel", "masked_lora_gemm_kernel",
    "rms_norm_backward_kernel", "rms_norm_kernel", "rotary_kernel", "scale_kernel", "slot_squares_kernel",
    "sum_partials_kernel", "total_kernel", "weight_grad_kernel",
}  # fmt: skip


def sizes(rng, name, aligned):
    """Sizes in place of those of the case: of one program, of several, with and without a rest."""
    if name == "group_lasso-separate":
        return {}
    if CASES[name].op.startswith("group"):
        return {6: rng.choice([1, 70, 700]), 3: rng.choice([3, 300]), 5: rng.choice([5, 90])}
    wide = lambda: 8 * rng.randint(1, 24) + (0 if aligned else rng.choice([0, 0, 3]))  # noqa: E731
    return {M: rng.choice([1, 17, 60, 130]), N: wide(), K: wide(), R: rng.choice([1, 3, 16, 40])}


def run(name, seed, dtype, aligned=False):
    rng = random.Random(f"{name} {seed}")
    case = CASES[name].sized(sizes(rng, name, aligned))
    case.run(case.operands(dtype), "triton", torch.ones_like)


def check(name, seeds, monkeypatch, seen, tiled=TILES):
    with watched(monkeypatch) as found:
        for seed in seeds:
            run(name, seed, (torch.float32, torch.bfloat16)[seed % 2])
        if name in TILED:
            for tile in tiled:
                monkeypatch.setenv(tiles.TILE_VARIABLE, tile)
                for seed in seeds:
                    run(name, seed, torch.bfloat16, aligned=True)  # else no descriptor addresses the operands
            monkeypatch.delenv(tiles.TILE_VARIABLE, raising=False)
        if name == "rms_norm":  # rows that a tile does not hold, whose weight takes a kernel of its own
            monkeypatch.setattr(norm, "tile_for", lambda width: norm.Tile(2, 16, 4))
            leaves = torch.ones(70, 150).requires_grad_(), torch.ones(150).requires_grad_()
            rms_norm(*leaves, eps=1e-5, backend="triton").sum().backward()
    assert found.races == []
    seen.update(found.kernels)


def test_no_kernel_races(monkeypatch):
    seen = set()
    for name in QUICK:
        check(name, range(1), monkeypatch, seen, ["64x128x64"] if name == "linear-sum" else [])
    assert seen == KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("name", TRITON)
def test_no_kernel_races_for_many_shapes(monkeypatch, name):
    check(name, range(1, 9), monkeypatch, set())


@triton.jit
def shifted_kernel(x_ptr, y_ptr, SHIFT: tl.constexpr, LOADS: tl.constexpr):
    at = tl.program_id(0) * 8 + tl.arange(0, 8 + SHIFT)
    if LOADS:
        values = tl.load(y_ptr + at + 4)
    else:
        values = tl.load(x_ptr + at)
    tl.store(y_ptr + at, values)


@pytest.mark.parametrize(
    ("shift", "loads", "said"),
    [(0, False, []), (8, False, ["both store"]), (0, True, ["one loads what another stores"])],
)
def test_races_made_on_purpose_are_found(monkeypatch, shift, loads, said):
    x, y = torch.ones(64), torch.zeros(64)
    with watched(monkeypatch) as found:
        shifted_kernel[(3,)](x, y, SHIFT=shift, LOADS=loads)
    assert [what for _, what in found.races] == said
