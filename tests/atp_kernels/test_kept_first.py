"""Kept slices whose sides lie kept first, from producer to consumer, and the registered operators of kept slices."""

import pytest
import torch
from linear_cases import Shape, with_gradients
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from atp_kernels import KeptFirst, KeptSlice, Projection, kept_lora_linear, masked_lora_qkv
from atp_kernels.linear import definition
from atp_kernels.qkv.definition import masked_lora_qkv as defined_qkv

BOTH = Shape(m=12, n=44, k=52, out_mask="hard", in_mask="hard")


def test_order_lists_kept_then_removed_positions():
    order = KeptFirst(torch.tensor([False, True, False, True, True]), pad_to=4)
    assert order.index.tolist() == [1, 3, 4, 0, 2] and order.place.tolist() == [3, 0, 4, 1, 2]
    assert (order.size, order.kept, order.width) == (5, 3, 4)
    assert KeptFirst(order.mask, pad_to=32).width == 5


def mlp(x, gate, up, down, slices):
    g, u = (kept_lora_linear(x, kept, *linear, scaling=1.5) for kept, linear in zip(slices, (gate, up), strict=False))
    return kept_lora_linear(silu(g) * u, slices[2], *down, scaling=1.5)


def mlp_operands(first):
    rng = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(size, generator=rng) / size[-1] ** 0.5  # noqa: E731
    hidden, channels, rank = 24, 96, 4
    mask = torch.rand(channels, generator=rng) < 0.5
    weights = randn(channels, hidden), randn(channels, hidden), randn(hidden, channels)
    factors = [
        (randn(rank, k).requires_grad_(), randn(n, rank).requires_grad_()) for n, k in map(torch.Tensor.size, weights)
    ]
    order = KeptFirst(mask, pad_to=8) if first else mask
    masks = {"out_mask": order}, {"out_mask": order}, {"in_mask": order}
    slices = [KeptSlice(w, **m, pad_to=8) for w, m in zip(weights, masks, strict=True)]
    return randn(3, 5, hidden).requires_grad_(), factors, slices, weights, mask


def test_producer_to_consumer_needs_no_permutation():
    x, factors, slices, weights, mask = mlp_operands(first=True)
    y = mlp(x, *factors, slices)
    wide = {"x": x, **{str(i): f for i, f in enumerate(f for pair in factors for f in pair)}}
    got = with_gradients((y,), wide)

    def linear(x, i, **masks):
        return definition.masked_lora_linear(x, weights[i], *factors[i], scaling=1.5, **masks)

    h = silu(linear(x, 0, out_mask=mask)) * linear(x, 1, out_mask=mask)
    for name, value in with_gradients((linear(h, 2, in_mask=mask),), wide).items():
        assert_close(got[name], value, msg=name)


def test_whole_heads_go_from_q_k_v_to_o_without_a_permutation():
    rng = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(size, generator=rng) / size[-1] ** 0.5  # noqa: E731
    heads, groups, width, hidden = 6, 3, 4, 16
    group = torch.tensor([False, True, True])
    mask, kv_mask = group.repeat_interleave(heads // groups * width), group.repeat_interleave(width)
    sizes = ((heads * width, hidden), (groups * width, hidden), (groups * width, hidden), (hidden, heads * width))
    q, k, v, o = (Projection(randn(n, m), randn(3, m), randn(n, 3), 1.5) for n, m in sizes)
    x = randn(2, 5, hidden).requires_grad_()

    def attend(q, k, v):
        parts = (value.unflatten(-1, (-1, width)).transpose(1, 2) for value in (q, k, v))
        return scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)

    order, kv_order = KeptFirst(mask, pad_to=8), KeptFirst(kv_mask, pad_to=8)
    orders = zip((q, k, v), (order, kv_order, kv_order), strict=True)
    kept = tuple(KeptSlice(p.weight, out_mask=some) for p, some in orders)
    attention = attend(*masked_lora_qkv(x, q, k, v, kept=kept))
    y = kept_lora_linear(attention, KeptSlice(o.weight, in_mask=order), o.lora_a, o.lora_b, scaling=1.5)

    attention = attend(*defined_qkv(x, q, k, v, masks=(mask, kv_mask, kv_mask)))
    expected = definition.masked_lora_linear(attention, o.weight, o.lora_a, o.lora_b, scaling=1.5, in_mask=mask)
    assert_close(y, expected)
    assert_close(*(torch.autograd.grad(value.square().sum(), x) for value in (y, expected)))


class _NoGather(TorchDispatchMode):
    """Refuses to permute, gather or scatter anything as long as the activations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("gather", "index", "scatter", "columns")):
            assert 15 not in args[0].shape, f"{func} of {list(args[0].shape)}"
        return func(*args, **(kwargs or {}))


def test_no_activation_is_gathered():
    for first in (True, False):
        x, factors, slices, *_ = mlp_operands(first)
        x = x.detach().reshape(15, -1).requires_grad_()
        try:
            with _NoGather():
                mlp(x, *factors, slices).sum().backward()
            gathered = False
        except AssertionError:
            gathered = True
        assert gathered != first


@pytest.mark.parametrize(("dynamic", "first"), [(False, False), (True, True)])
def test_compile_whole_graph(dynamic, first):
    torch._dynamo.reset()
    x, factors, slices, *_ = mlp_operands(first)
    for kept in slices:
        kept.weight(torch.float32)
    leaves = {str(i): f for i, f in enumerate(f for pair in factors for f in pair)}
    compiled = torch.compile(mlp, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 9, 12):
        x = torch.randn(2, tokens, 24).requires_grad_()
        expected = with_gradients((mlp(x, *factors, slices),), leaves | {"x": x})
        assert_close(with_gradients((compiled(x, *factors, slices),), leaves | {"x": x}), expected)


def test_compiling_before_the_slice_is_gathered_says_what_to_do():
    torch._dynamo.reset()
    kept = KeptSlice(torch.ones(8, 8), in_mask=torch.arange(8) < 4, pad_to=1)
    compiled = torch.compile(
        lambda x: kept_lora_linear(x, kept, torch.ones(2, 8), torch.ones(8, 2), scaling=1.0),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match="call weight"):
        compiled(torch.ones(3, 8))


def test_slices_of_all_sizes_hold_what_was_asked_for_last():
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, k, generator=rng) for n, k in ((8, 40), (70, 30), (20, 20), (70, 30))]
    slices = [KeptSlice(w, out_mask=torch.rand(len(w), generator=rng) < 0.5, pad_to=1) for w in weights]
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for kept, weight in zip(slices, weights, strict=True):
            expected = weight[kept.out_mask].to(dtype)
            assert torch.equal(kept.weight(dtype)[: len(expected)], expected)
            assert not kept.weight(dtype)[len(expected) :].any()


def test_a_slice_of_everything_is_the_weight_itself():
    weight = torch.ones(8, 12)
    for mask in (None, torch.ones(8, dtype=torch.bool), KeptFirst(torch.ones(8, dtype=torch.bool))):
        kept = KeptSlice(weight, out_mask=mask)
        assert kept.weight(torch.float32).data_ptr() == weight.data_ptr()
        assert torch.equal(kept.weight(torch.bfloat16), weight.bfloat16())


def test_a_large_slice_is_the_kept_part():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(2100, 1100, generator=rng)
    masks = {"out_mask": torch.rand(2100, generator=rng) < 0.9, "in_mask": torch.rand(1100, generator=rng) < 0.9}
    held = KeptSlice(weight, **masks).weight(torch.float32)
    kept = weight[masks["out_mask"]][:, masks["in_mask"]]
    assert held.numel() > 2**20 and torch.equal(held[: len(kept), : kept.shape[1]], kept)
    assert not held[len(kept) :].any() and not held[:, kept.shape[1] :].any()
