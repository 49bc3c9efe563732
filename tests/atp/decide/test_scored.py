"""Decisions by saliency: the running mean against its definition, and what a margin holds."""

import math

import pytest
import torch
from transformers import LlamaConfig

from atp.config import DecisionsConfig
from atp.decide.budget import Budget
from atp.decide.saliency import saliency_logits
from atp.decide.scored import ScoredDecisions
from atp.spaces.space import MaskSpace

SPACE = MaskSpace.from_config(
    LlamaConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
        intermediate_size=48,
    )
)  # fmt: skip


def make(**config):
    settings = {"source": "running", "margin": 0.0, "multiples": {}} | config
    return ScoredDecisions(SPACE, DecisionsConfig(**settings), search_steps=4)


def gradients(count, seed=0):
    return torch.randn(count, SPACE.size, generator=torch.Generator().manual_seed(seed))


def test_the_running_saliency_is_the_decayed_mean_of_squares():
    decisions = make(decay=0.8)
    for gradient in gradients(5):
        decisions.observe(gradient.square())
    weights = torch.tensor([0.2 * 0.8 ** (4 - i) for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(decisions.saliency.double(), weights @ gradients(5).double().square())
    assert torch.equal(decisions.logits(), saliency_logits(decisions.saliency, Budget(SPACE), decisions.config))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_saliency_is_divided_by_a_power_of_the_parameters_saved(exponent):
    saliency, cost = gradients(1)[0].double().square(), Budget(SPACE).cost().double()
    logits = saliency_logits(saliency, Budget(SPACE), DecisionsConfig(cost_exponent=exponent, saliency_scale=2.0))
    scores = saliency.log() - exponent * cost.log()
    torch.testing.assert_close(logits.double(), 2 * (scores - scores.mean()) / scores.std())


def test_a_removed_decision_keeps_its_score():
    decisions = make()
    first, second = gradients(2)
    decisions.observe(first.square())
    removed = decisions.refresh(3).logical_not()
    before = decisions.saliency.clone()
    decisions.observe(second.square())
    assert removed.any() and torch.equal(decisions.saliency[removed], before[removed])
    assert (decisions.saliency != before)[~removed].all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    decisions = make()
    good, spoiled = gradients(2)
    spoiled[7] = bad
    decisions.observe(good.square())
    before = decisions.saliency.clone()
    decisions.observe(spoiled.square())
    assert torch.equal(decisions.saliency, before)


def test_a_margin_holds_close_calls_and_no_others():
    flips = {}
    for margin in (0.0, 0.3, 100.0):
        decisions = make(decay=0.0, margin=margin)
        scores = gradients(1).squeeze(0)
        decisions.observe(scores.square())
        decisions.refresh(3)
        decisions.saliency = (scores * torch.exp(0.2 * gradients(1, seed=1).squeeze(0))).square()
        decisions.refresh(3)
        flips[margin] = float(decisions.changed)
    assert flips[0.0] > flips[0.3] > 0 and flips[100.0] == 0


def test_measured_decisions_follow_the_cubic_and_end_on_budget():
    decisions = make(source="tuned", reach=1.0)
    decisions.saliency = gradients(1).squeeze(0).square()
    shares = [decisions.budget.share(decisions.refresh(step)) for step in range(4)]
    assert shares == sorted(shares, reverse=True)
    for step, share in enumerate(shares):
        expected = 0.6 + 0.4 * (1 - (step + 1) / 4) ** 3
        assert expected - 0.02 < share <= expected
    assert abs(decisions.budget.share(decisions.freeze()) - 0.6) < 0.01 and decisions.frozen
