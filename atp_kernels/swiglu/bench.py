"""Benchmark cases of the gated MLP: decision step, hard masks of the LoRA step, no masks."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from atp_kernels import KeptFirst, KeptSlice, Projection, masked_lora_swiglu
from benchmarks.baselines import AddmmLora, unfused
from benchmarks.blocks import TESTS, block_work, projections
from benchmarks.case import Case, Op, Variant, Variants
from benchmarks.linears import by_backend

_MLP = ("gate_proj", "up_proj", "down_proj")


def unfused_mlp(x: Tensor, linears: list[Projection], mask: Tensor | None = None, mask_sum: bool = False) -> Tensor:
    """The gated MLP by itself in every operation; without `mask_sum` the base paths alone are masked."""
    gate, up, down = (linear[:3] for linear in linears)
    hidden = silu(unfused(x, *gate, mask, None, mask_sum)) * unfused(x, *up, mask, None, mask_sum)
    return unfused(hidden, *down, in_mask=None if mask_sum else mask)


def addmm_mlp(x: Tensor, linears: list[Projection]) -> Tensor:
    """The gated MLP on the `addmm_` idiom, without masks."""
    gate, up, down = (linear[:3] for linear in linears)
    return AddmmLora.apply(silu(AddmmLora.apply(x, *gate)) * AddmmLora.apply(x, *up), *down)


def swiglu(case: Case, *, regime: str) -> Variants:
    """The MLP in a regime: `decision` (soft mask on the sums), `hard` (kept first from gate to down), `unmasked`."""
    x, linears = projections(case, _MLP, train_factors=regime != "decision")
    weights = [linear.weight for linear in linears]
    channels = case.sizes.inner
    mask, slices = None, None
    sides: list[dict[str, Any]]
    if regime == "decision":
        mask = torch.rand(channels, device=case.device).requires_grad_()
    elif regime == "hard":
        mask = torch.rand(channels, device=case.device) < case.keep
        first = KeptFirst(mask)
        sides = [{"out_mask": first}, {"out_mask": first}, {"in_mask": first}]
        slices = tuple(KeptSlice(weight, **side) for weight, side in zip(weights, sides, strict=True))
    soft = regime == "decision"
    inputs: tuple[Any, ...] = (x, mask) if soft else (x, *(factor for linear in linears for factor in linear[1:3]))
    grad = torch.randn_like(x)
    masked = {"mask": mask, "mask_lora": soft} if slices is None else {"kept": slices}
    width = min(-(-round(channels * case.keep) // 64) * 64, channels) if regime == "hard" else channels
    small_gate, small_up, small_down = weights[0][:width], weights[1][:width], weights[2][:, :width].contiguous()
    torch.compiler.reset()
    compiled = torch.compile(unfused_mlp, fullgraph=True, dynamic=False)

    def ours(backend: str) -> Variant:
        call = partial(masked_lora_swiglu, x, *linears, backend=backend, **masked)
        return Variant(call, inputs, grad, holds=(x, linears, slices))

    def dense() -> Tensor:
        return (silu(x @ small_gate.T) * (x @ small_up.T)) @ small_down.T

    return {
        "unfused": Variant(partial(unfused_mlp, x, linears, mask, soft), inputs, grad, holds=(x, linears)),
        "compile": Variant(partial(compiled, x, linears, mask, soft), inputs, grad, holds=(x, linears)),
        "addmm": Variant(
            partial(addmm_mlp, x, linears), (x,) if soft else inputs, grad, same=mask is None, holds=(x, linears)
        ),
        **by_backend("masked_lora_swiglu", (x, *linears[0][:3]), ours),
        "floor": Variant(dense, (x,), grad, same=False, holds=(x, small_gate, small_up, small_down)),
    }


def _op(regime: str) -> Op:
    return Op(
        f"swiglu_{regime}",
        build=partial(swiglu, regime=regime),
        work=partial(block_work, names=_MLP, regime=regime),
        parts=lambda model: ("mlp",),
        tests=TESTS,
    )


OPS = tuple(_op(regime) for regime in ("decision", "hard", "unmasked"))
