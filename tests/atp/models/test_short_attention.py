"""Attention of short windows: exact, no less so than torch's in bfloat16, and taken where it is meant to be."""

import pytest
import torch
from torch.nn import functional

from atp.models import attention
from atp.models import short_attention as module
from atp.models.attention import training_mask
from atp.models.short_attention import LONGEST, short_attention

TOKENS, POSITIONS = 7, torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])


def inputs(dtype=torch.float64, batch=2, heads=6, groups=2, tokens=TOKENS, widths=(8, 8)):
    """In the layout that linears leave them in."""
    torch.manual_seed(0)
    shapes = ((heads, widths[0]), (groups, widths[0]), (groups, widths[1]))
    return [torch.randn(batch, tokens, *shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def mask_of(kind, batch=2):
    positions = {"causal": None, "rows": POSITIONS[:batch], "shared": POSITIONS[:1]}[kind]
    return None if positions is None else training_mask(positions, positions, None)


def fused(query, key, value, mask, scaling=0.3):
    options = {"is_causal": mask is None, "scale": scaling, "enable_gqa": True}
    return functional.scaled_dot_product_attention(query, key, value, mask, **options)


def results(attend, states, mask):
    output = attend(*states, mask, 0.3)
    torch.manual_seed(1)
    return output, *torch.autograd.grad(output, states, torch.randn(output.shape).to(output.dtype))


@pytest.mark.parametrize("kind", ["causal", "rows", "shared"])
@pytest.mark.parametrize("sizes", [{}, {"groups": 6}, {"groups": 1}, {"widths": (8, 5)}, {"batch": 1}], ids=str)
def test_is_attention(sizes, kind, monkeypatch):
    states, mask = inputs(**sizes), mask_of(kind, sizes.get("batch", 2))
    expected = results(fused, states, mask)
    for scores in (1, module._SCORES):  # each row by itself, and all at once
        monkeypatch.setattr(module, "_SCORES", scores)
        for ours, theirs in zip(results(short_attention, states, mask), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [2, 24, 192])
def test_bfloat16_is_as_near_to_float64_as_the_fused_kernel(tokens):
    states = inputs(torch.bfloat16, tokens=tokens, widths=(64, 64))
    exact = results(fused, [part.detach().double().requires_grad_() for part in states], None)
    both = (results(attend, states, None) for attend in (short_attention, fused))
    for ours, theirs, truth in zip(*both, exact, strict=True):
        far, allowed = (float((found.double() - truth).norm() / truth.norm()) for found in (ours, theirs))
        assert ours.dtype == torch.bfloat16 and far <= 1.5 * allowed + 1e-3


def test_a_token_that_sees_nothing_gets_the_mean():
    """Rows of padding on the left do; what they give is masked elsewhere, and must not be NaN."""
    states = inputs()
    mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    mask[0, :, :3] = False
    output, *gradients = results(short_attention, states, mask)
    mean = states[2][0].mean(1).repeat_interleave(3, 0)
    torch.testing.assert_close(output[0, :, 0], mean)
    assert all(bool(part.isfinite().all()) for part in gradients)


def test_autocast_casts_what_it_reads():
    """RoPE gives float32 queries and keys beside bfloat16 values."""
    query, key, value = inputs(torch.float32)
    mixed = (query, key, value.detach().bfloat16().requires_grad_())
    expected = short_attention(*(part.detach().bfloat16() for part in mixed), None, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(short_attention, mixed, None)
        assert module.suits(*mixed, None)
    assert torch.equal(found[0], expected)
    assert [gradient.dtype for gradient in found[1:]] == [part.dtype for part in mixed]
    assert not module.suits(*mixed, None)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"heads": 0, "groups": 0}], ids=str)
def test_nothing_is_left_to_the_fused_kernel(sizes):
    assert not module.suits(*inputs(torch.bfloat16, **sizes), None)


class Layer(torch.nn.Module):
    num_key_value_groups, is_causal = 3, True


@pytest.mark.parametrize(
    ("taken", "changes", "options"),
    [
        (True, {}, {}),
        (True, {"tokens": LONGEST}, {}),
        (False, {"tokens": LONGEST + 1}, {}),
        (False, {"tokens": 1}, {}),
        (False, {"dtype": torch.float32}, {}),
        (False, {}, {"dropout": 0.1}),
        (False, {}, {"mask": torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bfloat16)}),
        (False, {}, {"cached": 3}),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_takes_it(taken, changes, options, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(1)
        return short_attention(*arguments)

    monkeypatch.setattr(attention, "short_attention", counted)
    query, key, value = inputs(**{"dtype": torch.bfloat16} | changes)
    query = query[:, :, options.get("cached", 0) :]
    output, _ = attention._attention(
        Layer(), query, key, value, options.get("mask"), dropout=options.get("dropout", 0.0), scaling=0.3
    )
    assert len(calls) == taken
    assert output.shape == (2, query.shape[2], 6, 8) and output.is_contiguous()


def test_a_penalty_on_a_gradient_is_refused():
    """After a sum too, from which a constant comes back."""
    states = inputs()
    total = short_attention(*states, mask_of("causal"), 0.3).sum()
    (gradient,) = torch.autograd.grad(total, states[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
