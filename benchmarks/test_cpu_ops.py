"""CPU cases of the kernels beside unfused PyTorch, forward and backward (`make bench`).

Shapes are SmolLM2-135M's (hidden 576, MLP 1536) at 768 tokens, LoRA r 8; rows of one group are to be compared.
"""

import pytest
import torch

from atp_kernels import GroupPlan, group_lasso, masked_lora_linear

TOKENS, HIDDEN, INNER, RANK = 768, 576, 1536, 8
WIDTHS = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576), "gate": (576, 1536), "up": (576, 1536),
          "down": (1536, 576)}  # fmt: skip


def unfused(x, weight, lora_a, lora_b, *, scaling, out_mask, mask_lora):
    base, lora = x @ weight.T, scaling * ((x @ lora_a.T) @ lora_b.T)
    return (base + lora) * out_mask if mask_lora else base * out_mask + lora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("regime", ["decision", "lora"])
@pytest.mark.parametrize("linear", [unfused, masked_lora_linear], ids=["unfused", "ours"])
def test_masked_lora_linear(benchmark, dtype, regime, linear):
    """decision: soft mask on the sum with its gradient; lora: hard mask on the base path, gradients of the factors."""
    benchmark.group = f"masked_lora_linear {regime} {dtype}"
    torch.manual_seed(0)
    soft = regime == "decision"
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(INNER, HIDDEN, dtype=dtype)
    lora_a = torch.randn(RANK, HIDDEN, dtype=dtype, requires_grad=not soft)
    lora_b = torch.randn(INNER, RANK, dtype=dtype, requires_grad=not soft)
    mask = torch.rand(INNER)
    mask = mask.requires_grad_() if soft else mask < 0.6
    grad = torch.randn(TOKENS, INNER, dtype=dtype)
    inputs = [t for t in (x, lora_a, lora_b, mask) if t.requires_grad]

    def step():
        y = linear(x, weight, lora_a, lora_b, scaling=1.0, out_mask=mask, mask_lora=soft)
        return torch.autograd.grad(y, inputs, grad.to(y.dtype))

    benchmark(step)


@pytest.mark.parametrize("variant", ["loop", "list", "plan"])
def test_group_lasso(benchmark, variant):
    """All 210 LoRA modules of the model, one norm a row of B or column of A, 40 % of the groups removed.

    loop: what one writes module by module. list and plan: one call, with the groups planned anew or once.
    """
    benchmark.group = "group_lasso"
    torch.manual_seed(0)
    factors, groups, start = [], [], 0
    for _ in range(30):
        for name, (inputs, outputs) in WIDTHS.items():
            axis = int(name in ("o", "down"))
            shape, size = ((RANK, inputs), inputs) if axis else ((outputs, RANK), outputs)
            factors.append(torch.randn(shape, requires_grad=True))
            groups.append((axis, torch.arange(start, start + size)))
            start += size
    removed = torch.rand(start) < 0.4

    described = GroupPlan.of(factors, groups, start) if variant == "plan" else groups

    def loop():
        total = torch.zeros(())
        for factor, (axis, index) in zip(factors, groups, strict=True):
            total = total + (factor.square().sum(1 - axis) + 1e-8).sqrt()[removed[index]].sum()
        return total

    def step():
        value = loop() if variant == "loop" else group_lasso(factors, described, removed)
        return torch.autograd.grad(value, factors)

    benchmark(step)
