"""Calls the CUDA sources that cuda_on_cpu.py has built for a CPU, and compares with the extension's own CPU code."""

import random
import sys
from types import SimpleNamespace

import torch

from atp_kernels import GroupPlan, compact, extension, group_lasso, group_lasso_grad_, group_prox_

torch.ops.load_library(sys.argv[1])
ON_CPU = extension.ops
NAMES = ("group_lasso_forward", "group_lasso_backward", "group_lasso_grad_", "group_prox_", "compact")
CUDA = SimpleNamespace(**{name: getattr(torch.ops.atp_cuda_on_cpu, name) for name in NAMES})
# Groups of one slot each are operators of their own, which have no CUDA code.
CUDA.separate_lasso_forward = ON_CPU.separate_lasso_forward
CUDA.separate_lasso_backward = ON_CPU.separate_lasso_backward


def both(call):
    """What a call returns with either code; a call makes its own operands."""
    found = []
    for ops in (ON_CPU, CUDA):
        extension.ops = ops
        found.append(call())
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def factors(rng):
    """(factors, their groups, removed): rows and columns of both dtypes, in groups that several factors share."""
    draw = torch.Generator().manual_seed(rng.randrange(2**31))
    count, made, groups = rng.choice([1, 3, 40, 1500]), [], []
    for _ in range(rng.randint(1, 4)):
        shape, axis = (rng.choice([1, 7, 33, 90]), rng.choice([1, 8, 65])), rng.randrange(2)
        made.append(torch.randn(shape, generator=draw).to(rng.choice([torch.float32, torch.bfloat16])))
        groups.append((axis, torch.randint(count, (shape[axis],), generator=draw)))
    return made, groups, torch.rand(count, generator=draw) > 0.4


def lasso(seed):
    given, groups, removed = factors(random.Random(seed))
    leaves = [factor.requires_grad_() for factor in given]
    value = group_lasso(leaves, GroupPlan.of(leaves, groups, len(removed)), removed, backend="native")
    return value.detach(), *torch.autograd.grad(value, leaves)


def lasso_grad(seed):
    given, groups, removed = factors(random.Random(seed))
    for factor in given:
        factor.requires_grad_().grad = torch.ones_like(factor)
    value = group_lasso_grad_(given, groups, removed, weight=0.5, backend="native")
    return value, *(factor.grad for factor in given)


def prox(seed):
    given, groups, removed = factors(random.Random(seed))
    group_prox_(given, groups, removed, 0.3, backend="native")
    return given


def gathered(seed):
    rng = random.Random(seed)
    dtype = rng.choice([torch.bfloat16, torch.float32])
    rows, cols = rng.choice([1, 5, 70]), rng.choice([1, 16, 67, 96])
    weight = torch.arange(rows * cols).view(rows, cols).to(dtype)
    keep = lambda size: rng.choice([None, torch.tensor(sorted(rng.sample(range(size), (size + 1) // 2)))])  # noqa: E731
    return (compact(weight, keep(rows), keep(cols), pad_to=rng.choice([1, 8]), backend="native"),)


for number in range(int(sys.argv[2])):
    for call in (lasso, lasso_grad, prox, gathered):
        both(lambda call=call, number=number: call(number))
print(f"{4 * int(sys.argv[2])} calls agree")
