"""Every operation as a call of named operands, for tests of what holds for all of them."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from backends_here import DEVICE, ON_GPU
from torch import Tensor

import atp_kernels
from atp_kernels import GroupPlan, KeptFirst, KeptSlice, Projection

M, N, K, R = 11, 19, 21, 3  # products large enough for the vendor's bfloat16 code
OPTIONS = {"scaling": 1.7, "mask_lora": False}
Operands = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One operation. `written` names the operands that it changes in place, which no layout may repeat."""

    op: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[Operands, str], tuple[Tensor, ...]]
    written: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def sized(self, sizes: Mapping[int, int]) -> "Case":
        """The case with other sizes in place of these."""
        shapes = {name: tuple(sizes.get(size, size) for size in shape) for name, shape in self.shapes.items()}
        return replace(self, shapes=shapes)

    def operands(self, dtype: torch.dtype) -> Operands:
        """Random contiguous tensors by name: bool where the name has "hard", float32 where it has "soft"."""
        rng, made = torch.Generator().manual_seed(zlib.crc32(self.op.encode())), {}
        for name, shape in self.shapes.items():
            if "targets" in name:
                made[name] = torch.randint(self.shapes["logits"][1], shape, generator=rng)
            elif "index" in name:
                made[name] = torch.randint(4, shape, generator=rng)
            elif "hard" in name or "removed" in name:
                made[name] = torch.rand(shape, generator=rng) > 0.4
            elif "soft" in name or "threshold" in name:
                made[name] = torch.rand(shape, generator=rng)
            else:
                made[name] = (torch.randn(shape, generator=rng) / 2).to(dtype)
        return {name: tensor.to(DEVICE) for name, tensor in made.items()}

    def leaves(self, operands: Operands) -> list[str]:
        """The names of those that learn."""
        learn = [name for name, tensor in operands.items() if tensor.is_floating_point() and name not in self.frozen]
        return [] if self.written else learn

    def run(self, operands: Operands, backend: str, upstream: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What the operation returns and writes, and its gradients for what `upstream` makes of each result."""
        leaves = {name: operands[name].requires_grad_() for name in self.leaves(operands)}
        results = self.call(operands, backend)
        found = {f"result {i}": result for i, result in enumerate(results)}
        found |= {name: operands[name] for name in self.written}
        if leaves:
            learnt = [result for result in results if result.requires_grad]
            upstreams = [upstream(result) for result in learnt]
            grads = torch.autograd.grad(learnt, list(leaves.values()), upstreams, allow_unused=True)
            found |= {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        return found


LINEAR = {"x": (2, M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,), "lora_input": (2, M, K)}
PROJECTIONS = {
    f"{name}_{part}": shape
    for name, (n, k) in {"gate": (N, K), "up": (N, K), "down": (M, N)}.items()
    for part, shape in {"weight": (n, k), "a": (R, k), "b": (n, R), "bias": (n,)}.items()
}
FACTORS = {"first": (6, 4), "second": (3, 5), "first_index": (6,), "second_index": (5,), "removed": (4,)}


def linear(**options) -> Callable:
    def call(t: Operands, backend: str) -> tuple[Tensor, ...]:
        tensors = {name.removesuffix("_hard").removesuffix("_soft"): tensor for name, tensor in t.items()}
        return (atp_kernels.masked_lora_linear(**tensors, **OPTIONS | options, backend=backend),)

    return call


def merged(t: Operands, backend: str) -> tuple[Tensor, ...]:
    with torch.autocast(DEVICE, torch.bfloat16):
        return linear()(t, backend)


def projections(t: Operands) -> list[Projection]:
    parts = ("weight", "a", "b", "bias")
    return [
        Projection(*(t[f"{name}_{part}"] for part in parts[:3]), 1.3, t[f"{name}_bias"])
        for name in ("gate", "up", "down")
    ]


def swiglu(mask_name: str, **options) -> Callable:
    def call(t: Operands, backend: str) -> tuple[Tensor, ...]:
        mask = t.get(mask_name)
        return (atp_kernels.masked_lora_swiglu(t["x"], *projections(t), mask=mask, **options, backend=backend),)

    return call


def kept_swiglu(order: Callable, **options) -> Callable:
    def call(t: Operands, backend: str) -> tuple[Tensor, ...]:
        mask = order(t["hard"])
        sides = ({"out_mask": mask}, {"out_mask": mask}, {"in_mask": mask})
        given = projections(t)
        kept = tuple(KeptSlice(p.weight, p.bias, **side, pad_to=2) for p, side in zip(given, sides, strict=True))
        return (atp_kernels.masked_lora_swiglu(t["x"], *given, kept=kept, **options, backend=backend),)

    return call


def qkv(**options) -> Callable:
    def call(t: Operands, backend: str) -> tuple[Tensor, ...]:
        gate, up, _ = projections(t)
        masks = (t.get("soft"), None, t.get("soft_v"))
        return atp_kernels.masked_lora_qkv(t["x"], gate, up, gate, masks=masks, **options, backend=backend)

    return call


def kept_linear(outs: Callable, ins: Callable, **options) -> Callable:
    def call(t: Operands, backend: str) -> tuple[Tensor, ...]:
        sides = {"out_mask": outs(t["out_hard"]), "in_mask": ins(t["in_hard"]), "pad_to": 2}
        kept = KeptSlice(t["weight"], t["bias"], **sides)
        given = options | {"lora_input": t.get("lora_input"), "scaling": 1.7, "backend": backend}
        return (atp_kernels.kept_lora_linear(t["x"], kept, t["lora_a"], t["lora_b"], **given),)

    return call


def module(t: Operands, backend: str) -> tuple[Tensor, ...]:
    layer = atp_kernels.nn.MaskedLoRALinear(t["weight"], t["bias"], r=len(t["lora_a"]), alpha=5.0)
    layer.lora_A, layer.lora_B = torch.nn.Parameter(t["lora_a"].detach()), torch.nn.Parameter(t["lora_b"].detach())
    layer.out_mask, layer.in_mask = t["out_soft"], t["in_hard"]
    merged = layer.merge()
    return layer(t["x"]), merged.weight.to(t["x"]) + 0 * t["x"].sum(), merged.bias + 0 * t["x"].sum()


def grouped(t: Operands) -> tuple[list[Tensor], list]:
    return [t["first"], t["second"]], [(0, t["first_index"]), (1, t["second_index"])]


def lasso(t: Operands, backend: str) -> tuple[Tensor, ...]:
    return (atp_kernels.group_lasso(*grouped(t), t["removed"], backend=backend),)


def separate_lasso(t: Operands, backend: str) -> tuple[Tensor, ...]:
    factors = [t["first"], t["second"]]
    first, second = torch.arange(10, device=DEVICE).split((6, 4))
    plan = GroupPlan.of(factors, [(0, first), (1, second)], 10)
    assert plan.separate != ON_GPU  # a plan on a GPU does not look
    return (atp_kernels.group_lasso(factors, plan, t["removed"], backend=backend),)


def lasso_grad(t: Operands, backend: str) -> tuple[Tensor, ...]:
    factors, groups = grouped(t)
    for name, factor in zip(("first", "second"), factors, strict=True):
        factor.requires_grad_().grad = t[f"{name}_grad"]
    weight = t["weight_soft"]
    return (atp_kernels.group_lasso_grad_(factors, groups, t["removed"], weight=weight, backend=backend),)


def prox(t: Operands, backend: str) -> tuple[Tensor, ...]:
    factors, groups = grouped(t)
    atp_kernels.group_prox_(factors, groups, t["removed"], t["threshold"], backend=backend)
    return ()


def compact(t: Operands, backend: str) -> tuple[Tensor, ...]:
    return (atp_kernels.compact(t["weight"], t["rows_index"], t["cols_index"], pad_to=4, backend=backend),)


def dropout(t: Operands, backend: str) -> tuple[Tensor, ...]:
    return (atp_kernels.lora_dropout(t["x"], 0.4, 3, backend=backend),)


def rms_norm(dtype: torch.dtype | None) -> Callable:
    def call(t: Operands, backend: str) -> tuple[Tensor, ...]:
        return (atp_kernels.rms_norm(t["x"], t["weight"], eps=1e-6, dtype=dtype, backend=backend),)

    return call


def add_rms_norm(dtype: torch.dtype | None) -> Callable:
    """The norm first: the sum is saved, and must not change."""

    def call(t: Operands, backend: str) -> tuple[Tensor, ...]:
        given = t["x"], t["output"], t["weight"]
        return atp_kernels.add_rms_norm(*given, eps=1e-6, multiplier=0.5, dtype=dtype, backend=backend)[::-1]

    return call


def rotary(t: Operands, backend: str) -> tuple[Tensor, ...]:
    q, k, angles = t["x"].unsqueeze(0), t["keys"].unsqueeze(0), (t["cos"].detach()[None], t["sin"].detach()[None])
    return tuple(part[0] for part in atp_kernels.rotary_embedding(q, k, *angles, width=8, backend=backend))


def cross_entropy(t: Operands, backend: str) -> tuple[Tensor, ...]:
    return (atp_kernels.cross_entropy_(t["logits"], t["targets"], backend=backend),)


def same(mask: Tensor) -> Tensor:
    return mask


KEPT = {**LINEAR, "out_hard": (N,), "in_hard": (K,)}
KEPT_ALONE = {name: shape for name, shape in KEPT.items() if name != "lora_input"}
DROPS = {"dropout": 0.4, "seeds": (3, 4)}
BLOCK = {"x": (M, K), **PROJECTIONS}
FROZEN = ("weight", "bias")
FROZEN_BLOCK = tuple(name for name in PROJECTIONS if name.endswith(("weight", "bias")))
ALONE = {name: shape for name, shape in LINEAR.items() if name != "lora_input"}
CASES = {
    "linear-plain": Case("masked_lora_linear", ALONE, linear()),
    "linear-merged": Case("masked_lora_linear", ALONE, merged, frozen=("weight", "lora_a", "lora_b", "bias")),
    "linear-soft": Case("masked_lora_linear", {**LINEAR, "out_mask_soft": (N,), "in_mask_soft": (K,)}, linear()),
    "linear-hard": Case("masked_lora_linear", {**LINEAR, "out_mask_hard": (N,), "in_mask_hard": (K,)}, linear()),
    "linear-sum": Case(
        "masked_lora_linear", {**ALONE, "out_mask_soft": (N,), "in_mask_hard": (K,)}, linear(mask_lora=True)
    ),
    "linear-dropout": Case(
        "masked_lora_linear", {**ALONE, "out_mask_hard": (N,), "in_mask_soft": (K,)}, linear(dropout=0.4, seed=3)
    ),
    "swiglu-plain": Case("masked_lora_swiglu", BLOCK, swiglu("none")),
    "swiglu-gelu": Case("masked_lora_swiglu", {**BLOCK, "soft": (N,)}, swiglu("soft", activation="gelu_tanh")),
    "swiglu-sum": Case("masked_lora_swiglu", {**BLOCK, "soft": (N,)}, swiglu("soft", mask_lora=True)),
    "swiglu-hard": Case("masked_lora_swiglu", {**BLOCK, "hard": (N,)}, swiglu("hard")),
    "swiglu-kept": Case("masked_lora_swiglu", {**BLOCK, "hard": (N,)}, kept_swiglu(same), frozen=FROZEN_BLOCK),
    "swiglu-first": Case("masked_lora_swiglu", {**BLOCK, "hard": (N,)}, kept_swiglu(KeptFirst), frozen=FROZEN_BLOCK),
    "swiglu-dropout": Case("masked_lora_swiglu", {**BLOCK, "soft": (N,)}, swiglu("soft", **DROPS)),
    "swiglu-first-dropout": Case(
        "masked_lora_swiglu", {**BLOCK, "hard": (N,)}, kept_swiglu(KeptFirst, **DROPS), frozen=FROZEN_BLOCK
    ),
    "qkv": Case("masked_lora_qkv", {**BLOCK, "soft": (N,), "soft_v": (N,)}, qkv(mask_lora=True)),
    "qkv-dropout": Case("masked_lora_qkv", BLOCK, qkv(dropout=0.4, seed=3), frozen=FROZEN_BLOCK),
    "kept": Case("kept_lora_linear", KEPT, kept_linear(same, same), frozen=FROZEN),
    "kept-first": Case("kept_lora_linear", KEPT, kept_linear(KeptFirst, same), frozen=FROZEN),
    "kept-last": Case("kept_lora_linear", KEPT, kept_linear(same, KeptFirst), frozen=FROZEN),
    "kept-dropout": Case(
        "kept_lora_linear", KEPT_ALONE, kept_linear(same, KeptFirst, dropout=0.4, seed=3), frozen=FROZEN
    ),
    "module": Case(
        "masked_lora_linear", {**ALONE, "out_soft": (N,), "in_hard": (K,)}, module, frozen=("weight", "bias")
    ),
    "group_lasso": Case("group_lasso", FACTORS, lasso),
    "group_lasso-separate": Case("group_lasso", {"first": (6, 4), "second": (3, 4), "removed": (10,)}, separate_lasso),
    "group_lasso_grad_": Case(
        "group_lasso_grad_",
        {**FACTORS, "first_grad": (6, 4), "second_grad": (3, 5), "weight_soft": ()},
        lasso_grad,
        written=("first_grad", "second_grad"),
    ),
    "group_prox_": Case("group_prox_", {**FACTORS, "threshold": (4,)}, prox, written=("first", "second")),
    "compact": Case("compact", {"weight": (6, 5), "rows_index": (3,), "cols_index": (4,)}, compact, frozen=("weight",)),
    "lora_dropout": Case("lora_dropout", {"x": (2, M, K)}, dropout),
    "rms_norm": Case("rms_norm", {"x": (2, M, K), "weight": (K,)}, rms_norm(None)),
    "rms_norm-narrow": Case("rms_norm", {"x": (M, K), "weight": (K,)}, rms_norm(torch.bfloat16)),
    "add_rms_norm": Case("add_rms_norm", {"x": (2, M, K), "output": (2, M, K), "weight": (K,)}, add_rms_norm(None)),
    "add_rms_norm-narrow": Case(
        "add_rms_norm", {"x": (M, K), "output": (M, K), "weight": (K,)}, add_rms_norm(torch.bfloat16)
    ),
    "rotary_embedding": Case(
        "rotary_embedding",
        {"x": (M, 3, 6), "keys": (M, 2, 6), "cos": (M, 6), "sin": (M, 6)},
        rotary,
        frozen=("cos", "sin"),
    ),
    "cross_entropy_": Case("cross_entropy_", {"logits": (M, K), "targets": (M,)}, cross_entropy, written=("logits",)),
}
