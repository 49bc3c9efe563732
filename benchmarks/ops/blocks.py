"""Whole pieces of a decoder layer: the gated MLP, and the three projections of attention."""

from dataclasses import replace
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor
from torch.nn.functional import silu

from atp_kernels import KeptFirst, KeptSlice, masked_lora_qkv, masked_lora_swiglu, stack_weights
from atp_kernels.reference import Projection
from benchmarks.baselines import AddmmLora, unfused
from benchmarks.case import Case, Op, Variant, Variants, Work
from benchmarks.ops.linear import by_backend, linear_work

_TESTS = ("tests/atp_kernels/test_blocks.py", "tests/atp_kernels/test_blocks_autograd.py")
_MLP, _QKV = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj")


def projections(case: Case, names: tuple[str, ...], *, train_factors: bool) -> tuple[Tensor, list[Projection]]:
    """Random x [tokens, hidden] and linears with their factors."""
    rng = torch.Generator(case.device).manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=rng, device=case.device).to(case.torch_dtype)  # noqa: E731
    linears = []
    for n_out, n_in in map(case.sizes.linears.__getitem__, names):
        weight, lora_a = (draw(rows, n_in).div_(n_in**0.5) for rows in (n_out, case.rank))
        factors = lora_a.requires_grad_(train_factors), draw(n_out, case.rank).requires_grad_(train_factors)
        linears.append(Projection(weight, *factors, 1.0))
    return draw(case.tokens, case.sizes.hidden).requires_grad_(), linears


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
    if regime == "decision":
        mask = torch.rand(channels, device=case.device).requires_grad_()
    elif regime == "hard":
        mask = torch.rand(channels, device=case.device) < case.keep
        first = KeptFirst(mask)
        slices = tuple(
            KeptSlice(weight, **{side: first})
            for weight, side in zip(weights, ("out_mask", "out_mask", "in_mask"), strict=True)
        )
    soft = regime == "decision"
    inputs = (x, mask) if soft else (x, *(factor for linear in linears for factor in linear[1:3]))
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


def qkv(case: Case) -> Variants:
    """The projections of attention without masks; `ours` multiplies weights that lie in one storage as one."""
    x, linears = projections(case, _QKV, train_factors=True)
    stack_weights(*(linear.weight for linear in linears))
    inputs = (x, *(factor for linear in linears for factor in linear[1:3]))
    grads = tuple(torch.randn(case.tokens, len(linear.weight), device=x.device).to(x.dtype) for linear in linears)
    whole = torch.cat([linear.weight for linear in linears])

    def ours(backend: str) -> Variant:
        return Variant(partial(masked_lora_qkv, x, *linears, backend=backend), inputs, grads, holds=(x, linears))

    def each(linear) -> tuple[Tensor, ...]:
        return tuple(linear(x, *projection[:3]) for projection in linears)

    return {
        "unfused": Variant(partial(each, unfused), inputs, grads, holds=(x, linears)),
        "addmm": Variant(partial(each, AddmmLora.apply), inputs, grads, holds=(x, linears)),
        **by_backend("masked_lora_linear", (x, *linears[0][:3]), ours),
        "floor": Variant(lambda: x @ whole.T, (x,), torch.cat(grads, 1), same=False, holds=(x, whole)),
    }


def block_work(case: Case, names: tuple[str, ...], *, regime: str = "unmasked") -> dict[str, Work]:
    """The sum of the linears' work; what lies between them is left out, and x counts once for each reader."""
    sides = {name: ("in_mask",) if name == "down_proj" else ("out_mask",) for name in names}
    works = [
        linear_work(replace(case, part=name), sides[name] if regime == "hard" else (), soft=regime == "decision")
        for name in names
    ]
    return {pass_: reduce(add, (work[pass_] for work in works)) for pass_ in ("forward", "backward")}


def _mlp_op(regime: str) -> Op:
    return Op(
        f"swiglu_{regime}",
        build=partial(swiglu, regime=regime),
        work=partial(block_work, names=_MLP, regime=regime),
        parts=lambda model: ("mlp",),
        tests=_TESTS,
    )


BLOCKS = (
    *(_mlp_op(regime) for regime in ("decision", "hard", "unmasked")),
    Op("qkv_unmasked", qkv, partial(block_work, names=_QKV), lambda model: ("attention",), _TESTS),
)
