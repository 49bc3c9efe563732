"""The budget and its loss against counting and finite differences, the search offset, and the fit with width rules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_spaces import config, larger, random_logits

from atp.decide.budget import Budget
from atp.decide.fit import exact_mask, exact_offset, fit_mask
from atp.decide.sampling import keep_one, soft_mask
from atp.spaces.space import MaskSpace

SPACES = ["head_dim", "kv_group", "disp"]


def random_mask(space, seed, keep=0.5):
    values = torch.rand(space.size, generator=torch.Generator().manual_seed(seed))
    return keep_one(values < keep, -values, space)


@pytest.mark.parametrize("space_name", SPACES)
def test_cost_is_what_removing_one_decision_saves(space_name):
    space = MaskSpace.from_config(config(attention_bias=True), space_name)
    budget = Budget(space)
    saved = []
    for decision in range(space.size):
        mask = torch.ones(space.size, dtype=torch.bool)
        mask[decision] = False
        saved.append(float(budget.total - budget.kept(mask)))
    assert budget.cost().tolist() == saved


def test_loss_is_the_log_ratio():
    space = MaskSpace.from_config(config())
    budget = Budget(space)
    whole = torch.ones(space.size)
    assert float(budget.loss(whole, 0.6)) == pytest.approx(-math.log(0.6), rel=1e-6)
    mask = random_mask(space, 3)
    assert float(budget.loss(mask.float(), 0.9)) == pytest.approx(abs(math.log(budget.share(mask) / 0.9)), rel=1e-6)
    assert float(budget.loss(mask.float(), budget.share(mask))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("target", [0.2, 0.95], ids=["above", "below"])
@pytest.mark.parametrize("space_name", SPACES)
def test_gradient_by_finite_differences(space_name, target):
    """`loss` returns float32, which is too coarse to difference, so the share is; the chain rule gives the rest."""
    space = MaskSpace.from_config(config(mlp_bias=True), space_name)
    budget = Budget(space)
    soft = torch.rand(space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    leaf = soft.clone().requires_grad_()
    budget.loss(leaf, target).backward()
    step, differences = 1e-5, []
    for decision in range(space.size):
        ends = []
        for sign in (1, -1):
            moved = soft.clone()
            moved[decision] += sign * step
            ends.append(abs(math.log(budget.share(moved) / target)))
        differences.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(leaf.grad, torch.tensor(differences, dtype=torch.float64), rtol=1e-5, atol=1e-8)


BUDGETS = {name: Budget(MaskSpace.from_config(larger(), name)) for name in ("head_dim", "kv_group", "disp")}


def removing_next(logits, mask):
    """The mask one threshold higher."""
    grown = mask.clone()
    grown[torch.where(mask, -torch.inf, logits).argmax()] = True
    return grown


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
def test_exact_offset_is_the_threshold_of_the_soft_mask(scale):
    budget = BUDGETS["head_dim"]
    logits = random_logits(budget, scale=scale)
    offset = exact_offset(logits, 0.5, budget)
    assert torch.equal(soft_mask(logits, offset, 0.4) >= 0.5, exact_mask(logits, 0.5, budget))


def test_neighbouring_floats_are_told_apart():
    """A threshold between two logits one float apart must not round onto the lower one."""
    budget = Budget(MaskSpace.from_config(config()))
    logits, values = torch.empty(budget.space.size), [torch.tensor(1.0)]
    for _ in range(budget.space.size - 1):
        values.append(torch.nextafter(values[-1], torch.tensor(2.0)))
    logits[torch.randperm(budget.space.size, generator=torch.Generator().manual_seed(0))] = torch.stack(values)
    for share in torch.linspace(0.4, 0.95, 23).tolist():
        mask = exact_mask(logits, share, budget)
        assert budget.share(mask) <= share < budget.share(removing_next(logits, mask))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.sampled_from(sorted(BUDGETS)), st.integers(0, 10**6), st.floats(0.3, 0.99), st.floats(0.3, 0.99))
def test_exact_masks_are_the_largest_under_their_share_and_nested(space_name, seed, one, other):
    budget = BUDGETS[space_name]
    logits = random_logits(budget, seed)
    low, high = sorted((one, other))
    masks = {share: exact_mask(logits, share, budget) for share in (low, high)}
    for share, mask in masks.items():
        assert budget.share(mask) <= share < budget.share(removing_next(logits, mask))
        for structure in budget.space.structures:
            kept, removed = logits[structure.span][mask[structure.span]], logits[structure.span][~mask[structure.span]]
            assert len(kept) >= 1 and (not len(removed) or kept.min() > removed.max())
    assert not (masks[low] & ~masks[high]).any()
    assert exact_offset(logits, low, budget) <= exact_offset(logits, high, budget)


def test_logits_are_only_read():
    budget = BUDGETS["head_dim"]
    logits = random_logits(budget).requires_grad_()
    before = logits.detach().clone()
    assert not exact_mask(logits, 0.5, budget).requires_grad
    assert not fit_mask(logits, 0.5, budget, {}).requires_grad
    assert torch.equal(logits.detach(), before)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.sampled_from(sorted(BUDGETS)), st.integers(0, 10**6), st.floats(0.25, 0.95))
def test_fit_is_within_two_permille_and_never_empty(space_name, seed, target):
    budget = BUDGETS[space_name]
    mask = fit_mask(random_logits(budget, seed), target, budget, {})
    assert abs(budget.share(mask) - target) < 0.002
    assert all(mask[s.span].any() for s in budget.space.structures)


@pytest.mark.parametrize("multiples", [{"mlp": 8}, {"mlp": 8, "qk": 2, "vo": 4}, {"mlp": 64}], ids=str)
@pytest.mark.parametrize("target", [0.35, 0.6, 0.9])
def test_fit_keeps_the_width_rules(target, multiples):
    budget = BUDGETS["head_dim"]
    logits = random_logits(budget, 5)
    mask = fit_mask(logits, target, budget, multiples)
    for structure in budget.space.structures:
        count = int(mask[structure.span].sum())
        assert count > 0 and count % multiples.get(structure.name, 1) == 0
        top = logits[structure.span].sort(descending=True).indices[:count]
        assert mask[structure.span][top].all(), "the largest logits are the ones that stay"
    # One block of 8 columns is 0.2 % of this small decoder, one of 64 columns 1.8 %.
    assert abs(budget.share(mask) - target) < (0.002 if multiples["mlp"] == 8 else 0.008)


def test_blocks_too_large_to_help_are_passed_over():
    """A KV group is 0.9 % of this decoder, an MLP channel 0.03 %: the next best block is not always one that helps."""
    budget = BUDGETS["kv_group"]
    assert abs(budget.share(fit_mask(random_logits(budget, 598094), 0.75, budget, {})) - 0.75) < 0.0005


@pytest.mark.parametrize("target", [0.75, 0.9, 0.97])
def test_a_width_that_is_no_multiple_is_kept_whole_or_rounded(target):
    """Whole MLPs of 512 shrink to 400 and 200, never to 312; head_dim 16 to 12; 8 pairs hold no block of 100."""
    budget = BUDGETS["head_dim"]
    logits = random_logits(budget, 7)
    for structure in budget.space.structures:
        logits[structure.span] -= {"qk": 10, "vo": 5, "mlp": 0}[structure.name]
    counts = budget.space.describe(fit_mask(logits, target, budget, {"vo": 12, "mlp": 200, "qk": 100}))
    assert set(counts["vo"]) <= {12, 16} and set(counts["mlp"]) <= {200, 400, 512} and set(counts["qk"]) == {8}
