"""LoRA linears of one input with their adapters as one: results of each alone, in fewer products."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from atp_kernels import KeptFirst, KeptSlice, Projection, masked_lora_qkv, masked_lora_swiglu
from atp_kernels.qkv import definition

NONE = (None, None, None)
WIDTHS, IN, RANKS = (24, 10, 16), 18, (3, 2, 4)


def first(mask):
    """Kept first, with no row beyond them: the slice is narrower than its side."""
    return KeptFirst(mask, pad_to=1)


KINDS = {
    "whole": NONE,
    "kept first": (first, first, first),
    "in the order of the model": (torch.Tensor.clone, first, None),
}


def problem(kind="whole", dtype=torch.float64, scalings=(1.5, 1.5, 1.5), seed=0):
    """(x, projections, the masks of a definition, slices or None)."""
    rng = torch.Generator().manual_seed(seed)
    randn = lambda *size: torch.randn(size, generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
    x, projections = randn(2, 5, IN).requires_grad_(), []
    for width, rank, scaling in zip(WIDTHS, RANKS, scalings, strict=True):
        a, b = randn(rank, IN).requires_grad_(), randn(width, rank).requires_grad_()
        projections.append(Projection(randn(width, IN), a, b, scaling, randn(width) if width != 10 else None))
    masks = [torch.rand(width, generator=rng) < 0.5 for width in WIDTHS]
    if kind == "whole":
        return x, projections, NONE, None
    sides = [None if make is None else make(mask) for make, mask in zip(KINDS[kind], masks, strict=True)]
    kept = tuple(
        KeptSlice(p.weight, p.bias, out_mask=side, pad_to=1) for p, side in zip(projections, sides, strict=True)
    )
    return x, projections, tuple(m if s is not None else None for m, s in zip(masks, sides, strict=True)), kept


def defined(x, *projections, masks=NONE):
    return definition.masked_lora_qkv(x, *projections, masks=masks)


def results(x, projections, results_of, leaves=None):
    """y of each, and the gradients of leaves for upstream ones that differ everywhere."""
    y, rng = results_of(x, *projections), torch.Generator().manual_seed(5)
    grads = [torch.randn(part.shape, generator=rng).to(part.dtype) for part in y]
    leaves = leaves or [x, *(factor for p in projections for factor in (p.lora_a, p.lora_b))]
    return [*y, *torch.autograd.grad(y, leaves, grads)]


def shared(kept):
    """In the model's order, as the definition has it."""

    def call(x, *projections):
        y = masked_lora_qkv(x, *projections, kept=kept, backend="reference")
        orders = [slice_.out_mask for slice_ in kept or ()]
        ordered = [order.place if isinstance(order, KeptFirst) else slice(None) for order in orders]
        return tuple(part[..., place] for part, place in zip(y, ordered, strict=True)) if kept else y

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_definition(kind):
    x, projections, masks, kept = problem(kind)
    expected = results(x, projections, lambda *given: defined(*given, masks=masks))
    assert_close(results(x, projections, shared(kept)), expected)


class Products(TorchDispatchMode):
    """Counts products, and sums of what is as large as x."""

    def __enter__(self):
        self.products = self.sums = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.products += name in ("aten::mm", "aten::addmm", "aten::addmm_")
        self.sums += name in ("aten::add", "aten::add_")
        return func(*args, **(kwargs or {}))


def counted(call):
    with Products() as counts:
        call()
    return counts.products, counts.sums


@pytest.mark.parametrize("kind", ["whole", "kept first"])
def test_adapters_of_one_input_take_one_product_each_way(kind):
    x, projections, _, kept = problem(kind)
    together = counted(lambda: results(x, projections, shared(kept)))
    x, projections, _, kept = problem(kind, scalings=(1.5, 1.5, 1.0))
    alone = counted(lambda: results(x, projections, shared(kept)))
    # S, P A and dA; and the gradients of x, which autograd would sum.
    assert alone[0] - together[0] == 3 * 2 and alone[1] - together[1] == 2


@pytest.mark.parametrize("kind", ["whole", "kept first"])
def test_gate_and_up_share_too(kind):
    rng = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(size, generator=rng, dtype=torch.float64)  # noqa: E731
    x, order = randn(5, 8).requires_grad_(), KeptFirst(torch.arange(12) % 3 > 0, pad_to=1)

    def call(second):
        weights = randn(12, 8), randn(12, 8), randn(8, 12)
        linears = [Projection(w, randn(2, w.shape[1]).requires_grad_(), randn(w.shape[0], 2).requires_grad_(), scaling)
                   for w, scaling in zip(weights, (1.5, second, 1.0), strict=True)]  # fmt: skip
        sides = ({"out_mask": order}, {"out_mask": order}, {"in_mask": order})
        kept = tuple(KeptSlice(w, pad_to=1, **side) for w, side in zip(weights, sides, strict=True))
        y = masked_lora_swiglu(x, *linears, kept=kept if kind != "whole" else None, backend="reference")
        torch.autograd.grad(y.sum(), [x, *(f for p in linears for f in (p.lora_a, p.lora_b))])

    together, alone = counted(lambda: call(1.5)), counted(lambda: call(1.0))
    assert alone[0] - together[0] == 3 and alone[1] - together[1] == 1


def test_what_cannot_be_shared_is_computed_alone():
    """Other scalings, inputs that are masked, and a base that trains."""
    x, projections, masks, _ = problem(scalings=(1.5, 0.5, 1.0))
    assert_close(results(x, projections, shared(None)), results(x, projections, defined))
    x, projections, *_ = problem()
    ins = torch.arange(IN) % 2 > 0
    kept = tuple(KeptSlice(p.weight, p.bias, in_mask=ins, pad_to=1) for p in projections)
    y = masked_lora_qkv(x, *projections, kept=kept, backend="reference")
    for part, p in zip(y, projections, strict=True):
        bias = 0 if p.bias is None else p.bias
        assert_close(part, (x * ins) @ p.weight.T + bias + 1.5 * x @ p.lora_a.T @ p.lora_b.T)
    projections[0].weight.requires_grad_()
    leaves = [x, projections[0].weight]
    assert_close(results(x, projections, shared(None), leaves), results(x, projections, defined, leaves))


def test_some_gradients_alone_and_results_that_nobody_reads():
    x, projections, *_ = problem()
    y = masked_lora_qkv(x, *projections, backend="reference")
    expected = defined(x, *projections)
    leaves = [x, projections[1].lora_b]
    assert_close(*(torch.autograd.grad(part[1].sum(), leaves) for part in (y, expected)))
    frozen = [p._replace(lora_a=p.lora_a.detach()) for p in projections[:2]] + projections[2:]
    leaves = [frozen[0].lora_b, frozen[2].lora_a]
    for given in (x, x.detach()):
        pair = (results(given, frozen, call, leaves) for call in (shared(None), defined))
        assert_close(*pair)
    empty = x[:0]
    assert [part.shape for part in masked_lora_qkv(empty, *projections, backend="reference")] == [
        (0, 5, width) for width in WIDTHS
    ]
