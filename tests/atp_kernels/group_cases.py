"""Factors whose rows or columns lie in groups, and all that the operations of groups make of them."""

import torch
from backends_here import DEVICE
from hypothesis import strategies as st

from atp_kernels import GroupPlan, group_lasso, group_lasso_grad_, group_prox_
from atp_kernels.groups import definition

KINDS = ("joint", "separate", "runs")
# Several tiles of slots, several steps along a slot, wide and narrow accesses, single rows and nothing at all.
SIZES = ((300, 3, 0), (4, 70, 1), (70, 5, 1), (3, 150, 0), (8, 40, 1), (1, 9, 0), (0, 4, 0), (6, 0, 0))


def problem(sizes=SIZES, dtypes=(torch.float32,), kind="joint", strided=False, n_groups=21, seed=0, device=DEVICE):
    """Factors whose dtypes take turns, their groups, and which are removed; (rows, columns, axis) are the sizes.

    joint: any slots share a group, and the last one owns nothing; runs: neighbours do, in some factors; separate: none.
    """
    rng = torch.Generator().manual_seed(seed)
    factors, groups, start = [], [], 0
    for i, size in enumerate(sizes):
        factors.append(drawn(rng, *size[:2], dtypes[i % len(dtypes)], strided, device).requires_grad_())
        begins = torch.rand(size[size[2]], generator=rng) < (0.3 if kind == "runs" and i % 2 else 1)
        begins[:1] = True
        index = torch.randint(n_groups - 1, begins.shape, generator=rng)
        groups.append((size[2], (index if kind == "joint" else start - 1 + begins.cumsum(0)).to(device)))
        start += int(begins.sum())
    return factors, groups, (torch.rand(n_groups if kind == "joint" else start, generator=rng) < 0.5).to(device)


def planned(kind, sizes=SIZES, dtype=torch.float32, seed=0, removed="some", strided=False, n_groups=21):
    """Factors on the CPU, their plan, and a mask with some, none or all of its groups removed."""
    factors, groups, some = problem(sizes, (dtype,), kind, strided, n_groups, seed, "cpu")
    masks = {"some": some, "none": torch.zeros_like(some), "all": torch.ones_like(some)}
    return factors, GroupPlan.of(factors, groups, len(some)), masks[removed]


def plans(kind):
    """A strategy of what `planned` makes."""
    shapes = st.tuples(st.integers(0, 70), st.sampled_from([1, 3, 8, 16, 29, 64, 131]), st.integers(0, 1))
    fields = {"sizes": st.lists(shapes, min_size=1, max_size=5), "seed": st.integers(0, 1000), "strided": st.booleans()}
    fields |= {"dtype": st.sampled_from([torch.float32, torch.bfloat16]), "n_groups": st.integers(2, 91)}
    return st.builds(planned, st.just(kind), **fields, removed=st.sampled_from(["some", "none", "all"]))


def drawn(rng, rows, cols, dtype, strided, device=DEVICE):
    values = torch.randn((rows, 2 * cols) if strided else (rows, cols), generator=rng).to(device, dtype)
    return values[:, ::2] if strided else values


def with_grads(factors, seed=1, strided=False):
    """The same factors with gradients that are there already."""
    rng = torch.Generator().manual_seed(seed)
    for factor in factors:
        factor.grad = drawn(rng, *factor.shape, factor.dtype, strided)
    return factors


def copies(factors, dtype=None):
    """Contiguous ones, and of their gradients, in this dtype or in their own."""
    made = [factor.detach().clone().contiguous().to(dtype).requires_grad_() for factor in factors]
    for copy, factor in zip(made, factors, strict=True):
        copy.grad = None if factor.grad is None else factor.grad.to(copy.dtype, copy=True).contiguous()
    return made


def outcome(factors, groups, removed, backend=None):
    """(value and gradients, value and sums of gradients, factors shrunk in place); without a backend the definition."""
    thresholds = 0.5 + 3 * torch.arange(len(removed), device=DEVICE) / len(removed)
    held = [factor.detach() for factor in factors]
    if backend is None:
        value = definition.group_lasso(factors, groups, removed)
        grads = torch.autograd.grad(-1.5 * value, factors, retain_graph=True)
        (1.5 * value).backward()
        definition.group_prox_(held, groups, removed, thresholds)
        added = value.detach()
    else:
        value = group_lasso(factors, groups, removed, backend=backend)
        grads = torch.autograd.grad(-1.5 * value, factors)
        added = group_lasso_grad_(factors, groups, removed, weight=1.5, backend=backend)
        group_prox_(held, groups, removed, thresholds, backend=backend)
    return (value.detach(), *grads), (added, *(factor.grad for factor in factors)), held
