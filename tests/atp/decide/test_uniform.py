"""Decisions with equal counts in all layers: from thresholds, from the fit, and in every source of decisions."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_spaces import larger
from tiny_spaces import random_logits as logits_of

from atp.config import ATPConfig, DecisionsConfig
from atp.decide.budget import Budget
from atp.decide.decisions import fit_decisions
from atp.decide.fit import exact_mask
from atp.decide.maker import DecisionMaker
from atp.decide.scored import ScoredDecisions
from atp.decide.uniform import equal_counts, equal_ranks, fit_equal, half_block, share_of
from atp.ground.errors import InputError, NotReached
from atp.spaces.space import MaskSpace

SPACE = MaskSpace.from_config(larger(), "kv_group")
BUDGET = Budget(SPACE)
random_logits = partial(logits_of, BUDGET)


def counts(mask):
    return {name: set(kept) for name, kept in SPACE.describe(mask).items()}


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.15, 0.95), st.sampled_from([1e-3, 1.0, 1e3]))
def test_any_threshold_keeps_equal_counts_in_the_order_of_each_layer(seed, share, scale):
    logits = random_logits(seed, scale)
    mask = exact_mask(equal_ranks(logits, SPACE), share, BUDGET)
    assert all(len(kept) == 1 for kept in counts(mask).values())
    for structure in SPACE.structures:
        kept, removed = logits[structure.span][mask[structure.span]], logits[structure.span][~mask[structure.span]]
        assert not len(removed) or kept.min() >= removed.max()


def test_equal_ranks_are_means_and_pass_gradients_by_rank():
    logits = random_logits(1).double().requires_grad_()
    equal = equal_ranks(logits, SPACE)
    first = [equal[s.span].max() for s in SPACE.structures if s.name == "mlp"]
    assert all(torch.equal(value, first[0]) for value in first)
    expected = torch.stack([logits[s.span].max() for s in SPACE.structures if s.name == "mlp"]).mean()
    assert torch.allclose(first[0], expected)
    (gradient,) = torch.autograd.grad(first[3], logits)
    tops = {s.start + int(logits[s.span].argmax()) for s in SPACE.structures if s.name == "mlp"}
    assert set(gradient.nonzero().flatten().tolist()) == tops
    assert torch.allclose(gradient.sum(), torch.ones(()).double())
    assert torch.equal(equal_ranks(equal, SPACE), equal)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.2, 0.95), st.sampled_from([1, 7, 64, 128]))
def test_the_fit_is_equal_near_the_budget_and_takes_the_largest_logits(seed, target, multiple):
    logits = random_logits(seed)
    mask = fit_equal(logits, target, BUDGET, {"mlp": multiple})
    found = counts(mask)
    assert all(len(kept) == 1 for kept in found.values())
    (width,) = found["mlp"]
    assert width % multiple == 0 or width == 512
    assert abs(BUDGET.share(mask) - target) <= half_block(BUDGET, {"mlp": multiple}) + 1e-9
    for structure in SPACE.structures:
        kept, removed = logits[structure.span][mask[structure.span]], logits[structure.span][~mask[structure.span]]
        assert not len(removed) or kept.min() > removed.max()


def test_the_fit_trades_heads_for_channels_by_their_logits_and_takes_the_nearest_share():
    heads = torch.cat([torch.full((s.size,), float(s.name == "kv_group")) for s in SPACE.structures])
    noise = 0.01 * random_logits()
    assert counts(fit_equal(10 * heads + noise, 0.6, BUDGET, {}))["kv_group"] == {3}
    assert counts(fit_equal(-10 * heads + noise, 0.6, BUDGET, {}))["kv_group"] == {1}
    low = fit_equal(random_logits(), 0.01, BUDGET, {"mlp": 128})
    assert counts(low) == {"kv_group": {1}, "mlp": {128}}


def test_the_fit_is_the_best_of_all_counts_near_the_budget():
    multiples, target = {"mlp": 32}, 0.5
    logits = random_logits(5)
    (heads,), (width,) = (counts(fit_equal(logits, target, BUDGET, multiples))[name] for name in ("kv_group", "mlp"))
    pairs = itertools.product(range(1, 4), range(32, 513, 32))
    near = [pair for pair in pairs if abs(share_of(BUDGET, pair) - target) <= half_block(BUDGET, multiples)]
    assert (heads, width) in near and set(near) <= set(equal_counts(BUDGET, target, multiples))
    # Above a threshold that keeps the target exactly, as whole structures in all layers.
    equal = equal_ranks(logits, SPACE)
    threshold = equal[exact_mask(equal, target, BUDGET)].min()
    worth = {
        pair: sum(
            float((BUDGET.cost() * (equal - threshold))[s.span].sort(descending=True).values[:n].sum())
            for s, n in zip(SPACE.layer(0), pair, strict=True)
        )
        for pair in near
    }
    assert worth[heads, width] == pytest.approx(max(worth.values()))


@pytest.mark.parametrize("source", ["tuned", "running", "learned"])
def test_every_source_keeps_layers_equal_all_the_way(source):
    config = DecisionsConfig(space="kv_group", source=source, uniform=True, multiples={"mlp": 32}, target_keep=0.5)
    if source == "learned":
        made = DecisionMaker(SPACE, config, search_steps=4, prior=random_logits(), seed=0)
        made.update(0, lambda soft: (soft * random_logits(7)).sum())
    else:
        made = ScoredDecisions(SPACE, config, search_steps=4)
        made.saliency = random_logits().exp()
    for step in range(4):
        assert all(len(kept) == 1 for kept in counts(made.refresh(step)).values())
    frozen = made.freeze()
    assert all(len(kept) == 1 for kept in counts(frozen).values())
    assert torch.equal(frozen, fit_decisions(made.logits(), config, BUDGET)) or source == "running"


def test_what_is_not_finite_or_has_no_name_elsewhere_is_refused():
    with pytest.raises(NotReached, match="NaN or infinity"):
        fit_equal(torch.full((SPACE.size,), torch.nan), 0.5, BUDGET, {})
    values = {"model": {"path": "m"}, "output_dir": "o", "decisions": {"space": "head_dim", "uniform": True}}
    with pytest.raises(InputError, match="decisions.*uniform needs space kv_group"):
        ATPConfig.parse(values)
    stock = ATPConfig.parse({"model": {"path": "m"}, "output_dir": "o", "preset": "stock"}).decisions
    assert stock.uniform and stock.multiples == {"mlp": 128}
