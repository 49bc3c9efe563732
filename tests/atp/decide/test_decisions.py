"""Decisions that are learned and those by saliency: schedule, budgets, freeze, losses, running means and margins."""

import math

import pytest
import torch
from transformers import LlamaConfig

from atp.config import DecisionsConfig
from atp.decide.budget import Budget
from atp.decide.maker import DecisionMaker, frozen
from atp.decide.saliency import saliency_logits
from atp.decide.scored import ScoredDecisions
from atp.spaces.space import MaskSpace

SPACE = MaskSpace.from_config(
    LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16,
    )
)  # fmt: skip
BUDGET = Budget(SPACE)
STEPS = 20


def maker(prior=None, seed=0, **config):
    return DecisionMaker(SPACE, DecisionsConfig(**config), search_steps=STEPS, prior=prior, seed=seed)


def prior():
    return torch.randn(SPACE.size, generator=torch.Generator().manual_seed(9))


def test_exact_target_falls_on_a_cubic_and_stays():
    decisions = maker(target_keep=0.6, reach=0.5)
    assert decisions.target_at(0) == 1.0
    for step in range(11):
        assert decisions.target_at(step) == pytest.approx(0.6 + 0.4 * (1 - step / 10) ** 3)
    assert decisions.target_at(10) == decisions.target_at(STEPS) == 0.6
    targets = [decisions.target_at(step) for step in range(STEPS)]
    assert targets == sorted(targets, reverse=True)
    assert maker(target_keep=0.7, reach=0.0).target_at(1) == 0.7, "at once"
    assert maker(target_keep=0.7, budget="penalty").target_at(0) == 0.7


@pytest.mark.parametrize("step", [0, 2, 7, 15])
def test_refresh_meets_the_exact_budget_from_below(step):
    decisions = maker(prior(), target_keep=0.5)
    mask = decisions.refresh(step)
    assert mask is decisions.mask and mask.dtype == torch.bool
    target = decisions.target_at(step + 1)
    assert target - 0.005 < BUDGET.share(mask) <= target
    assert torch.equal(decisions.refresh(step), mask), "the mask that LoRA sees is free of noise"
    assert decisions.changed == 0.0


def test_changed_is_the_share_of_decisions_that_flipped():
    decisions = maker(prior(), target_keep=0.5)
    before = decisions.mask
    mask = decisions.refresh(15)
    flipped = sum(a != b for a, b in zip(before.tolist(), mask.tolist(), strict=True))
    assert flipped > 0 and float(decisions.changed) == pytest.approx(flipped / SPACE.size, rel=1e-6)


@pytest.mark.parametrize("budget", ["exact", "penalty"])
@pytest.mark.parametrize("target", [0.4, 0.8])
def test_freeze_fits_target_and_width_rules(budget, target):
    decisions = maker(prior(), target_keep=target, budget=budget, multiples={"mlp": 8})
    decisions.refresh(3)
    mask = decisions.freeze()
    assert decisions.frozen and mask is decisions.mask
    assert abs(BUDGET.share(mask) - target) < 0.002
    assert all(count % 8 == 0 and count > 0 for count in SPACE.describe(mask)["mlp"])


def test_penalty_loss_is_alpha_times_the_log_ratio_of_a_sampled_mask():
    """The soft mask handed to the loss tells which decisions the sample keeps; the share follows by counting."""
    seen = []
    decisions = maker(prior(), target_keep=0.3, budget="penalty", alpha=2.0, offset=0.0)

    def loss_of(soft):
        seen.append(soft.detach())
        return soft.sum() * 0 + 2.5

    outcome = decisions.update(0, loss_of)
    assert outcome.applied and outcome.loss == 2.5
    kept = seen[0] >= 0.5
    for structure in SPACE.structures:
        assert kept[structure.span].any(), "otherwise keep_one would have to be counted too"
    assert 0.3 < BUDGET.share(kept) < 1
    assert float(outcome.budget_loss) == pytest.approx(2 * math.log(BUDGET.share(kept) / 0.3), rel=1e-5)


def test_soft_mask_of_the_exact_form_centres_on_the_budget():
    seen = []
    decisions = maker(prior(), target_keep=0.5, noise=0.0)

    def loss_of(soft):
        seen.append(soft.detach())
        return soft.mean()

    outcome = decisions.update(15, loss_of)
    assert outcome.budget_loss == 0.0
    assert abs(BUDGET.share(seen[0] >= 0.5) - 0.5) < 0.01
    assert seen[0].dtype == torch.float32 and 0 < seen[0].min() and seen[0].max() <= 1


@pytest.mark.parametrize("budget", ["exact", "penalty"])
def test_update_lowers_what_the_loss_punishes(budget):
    """A loss that wants decision 0 gone and decision 1 kept moves their logits apart."""
    decisions = maker(target_keep=0.6, budget=budget, lr=1e-2, alpha=0.0, offset=0.0)

    def gap():
        logits = decisions.generator.eval()().detach()
        return float(logits[0] - logits[1])

    before = gap()
    for step in range(10):
        decisions.update(step, lambda soft: soft[0] - soft[1])
    assert gap() < before - 0.1


def test_late_search_learns_at_a_fifth():
    decisions = maker(lr=1e-2)
    rates = []
    for step in (0, 15, 16, 19):
        decisions.update(step, lambda soft: soft.mean())
        rates.append(decisions.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2, 1e-2, 2e-3, 2e-3])


def test_gradients_are_clipped_and_not_applied_where_they_are_not_finite():
    decisions = maker()
    before = {n: p.detach().clone() for n, p in decisions.generator.named_parameters()}
    outcome = decisions.update(0, lambda soft: soft.sum() * float("nan"))
    assert not outcome.applied
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in decisions.generator.named_parameters())
    assert decisions.update(1, lambda soft: soft.sum()).applied
    # AdamW's first moment after one step is 0.1 times the clipped gradient.
    decisions = maker(clip=0.5)
    decisions.update(0, lambda soft: 1e4 * soft.sum())
    squares = sum(float(s["exp_avg"].square().sum()) for s in decisions.optimizer.state.values())
    assert math.sqrt(squares) == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_noise_is_a_seeded_stream_of_its_own_that_goes_on_to_the_freeze():
    masks = []
    for seed in (1, 1, 2):
        decisions = maker(budget="penalty", offset=0.0, seed=seed)
        torch.manual_seed(0)
        masks.append(decisions.refresh(0).clone())
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(decisions.refresh(1), masks[2])
    assert torch.equal(decisions.freeze(), decisions.freeze())


def test_frozen_gives_back_what_trained_before():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(KeyError), frozen(layer):
        assert not layer.weight.requires_grad
        raise KeyError
    assert layer.weight.requires_grad and not layer.bias.requires_grad


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
