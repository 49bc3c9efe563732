"""Whole blocks as decisions: their saliency, the rate at which they go, and masks on budget without them."""

import itertools

import pytest
import torch
from tiny_spaces import config, larger, random_logits
from torch.testing import assert_close

from atp.config import DecisionsConfig
from atp.decide.blocks import fit_with_blocks, rates, worths
from atp.decide.budget import Budget
from atp.decide.fit import exact_mask, fit_mask
from atp.decide.reach import nearest_share
from atp.decide.rules import width_rules
from atp.decide.saliency import fisher_saliency, squares
from atp.decide.scored import ScoredDecisions
from atp.ground.errors import NotReached
from atp.spaces.space import MaskSpace

RULES = {"mlp": 8}


def space_of(name="kv_group", **overrides):
    return MaskSpace.from_config(larger(**overrides), name)


def settings(**given):
    values = {"blocks": True, "source": "tuned", "multiples": RULES}
    return DecisionsConfig(**values | given)


def random_saliency(space, seed=0, together=1.0):
    """Of each decision, and of each structure `together` times the sum of what is in it."""
    each = torch.randn(space.size, generator=torch.Generator().manual_seed(seed)).exp()
    return torch.cat([each, torch.stack([together * each[s.span].sum() for s in space.structures])])


def kept(space, mask):
    return [int(mask[structure.span].sum()) for structure in space.structures]


def test_squares_are_those_of_each_decision_and_of_the_sum_over_each_structure():
    space = MaskSpace.from_config(config(), "kv_group")
    gradients = torch.randn(5, space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(squares(gradients, space, blocks=False), gradients**2)
    found = squares(gradients, space, blocks=True)
    assert torch.equal(found[:, : space.size], gradients**2)
    for index, structure in enumerate(space.structures):
        expected = torch.stack([sum(row[structure.start : structure.start + structure.size]) ** 2 for row in gradients])
        assert_close(found[:, space.size + index], expected)


@pytest.mark.parametrize("masked", [False, True])
def test_the_saliency_of_a_block_is_that_of_one_value_on_all_of_it(masked):
    space = MaskSpace.from_config(config(), "kv_group")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(space.size, generator=generator) for _ in range(4)]
    at = torch.rand(space.size, generator=generator) < 0.5 if masked else None

    def loss_of(batch, mask):
        return (batch * mask).sum().square() + (batch * mask**3).sum()

    found = fisher_saliency(space, weights, loss_of, at=at, blocks=True)
    for index, structure in enumerate(space.structures):
        total = 0.0
        for batch in weights:
            value = torch.ones((), dtype=torch.float64, requires_grad=True)
            mask = torch.ones(space.size, dtype=torch.float64) if at is None else at.double()
            scaled = mask.clone()
            scaled[structure.span] = mask[structure.span] * value
            total += float(torch.autograd.grad(loss_of(batch.double(), scaled), value)[0]) ** 2
        assert float(found[space.size + index]) == pytest.approx(total / 4, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", ["kv_group", "mlp"])
@pytest.mark.parametrize("together", [0.3, 0.9, 1.5])
def test_a_block_goes_at_the_rate_from_which_keeping_any_part_of_it_costs_more(name, together):
    """Against all ways to keep a part: what is trimmed is paid, and what is kept costs the rate per parameter."""
    space = space_of(name)
    budget = Budget(space)
    worth, whole = worths(random_saliency(space, together=together), budget, settings())
    cost, besides = budget.cost().double(), budget.with_block()
    for structure, all_of_it, rate, more in zip(
        space.structures, whole, rates(worth, whole, budget), besides, strict=True
    ):
        own, each = worth[structure.span].sort().values, float(cost[structure.start])
        for factor, goes in ((0.999, False), (1.001, True)):
            at = factor * float(rate)
            keeping = min(
                float(own[:trimmed].sum()) + at * (each * (structure.size - trimmed) + float(more))
                for trimmed in range(structure.size + 1)
            )
            assert (keeping > float(all_of_it)) == goes


def test_structures_that_are_no_blocks_never_go():
    space = MaskSpace.from_config(config(), "head_dim")
    budget = Budget(space)
    worth, whole = worths(random_saliency(space), budget, settings())
    assert rates(worth, whole, budget).isinf().all()


@pytest.mark.parametrize("together", [0.01, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "target"),  # space `mlp` keeps attention
    [*(("kv_group", share) for share in (0.05, 0.2, 0.5, 0.9)), *(("mlp", share) for share in (0.2, 0.5, 0.9))],
)
def test_masks_meet_the_budget_and_the_width_rules(name, together, target):
    space = space_of(name)
    budget, logits = Budget(space), random_logits(Budget(space))
    mask = fit_with_blocks(
        logits, random_saliency(space, together=together), budget, settings(space=name, target_keep=target)
    )
    one = 8 * max(float(budget.cost()[s.start]) for s in space.structures if s.name == "mlp")
    assert abs(budget.share(mask) - target) <= one / budget.total
    assert all(count % RULES.get(s.name, 1) == 0 for s, count in zip(space.structures, kept(space, mask), strict=True))
    assert mask.any()


def test_a_block_that_is_worth_least_goes_and_its_share_goes_to_the_others():
    """An MLP whose channels cancel out, and an attention of little worth; where others are worth more, nothing goes."""
    space = space_of()
    budget, saliency = Budget(space), random_saliency(space)
    logits = random_logits(budget)
    at = {(s.layer, s.name): space.size + index for index, s in enumerate(space.structures)}
    saliency[space.size :] = saliency[: space.size].sum()
    mask = fit_with_blocks(logits, saliency, budget, settings(target_keep=0.6))
    assert torch.equal(mask, fit_mask(logits, 0.6, budget, RULES)) and min(kept(space, mask)) > 0
    saliency[at[2, "mlp"]], saliency[at[4, "kv_group"]] = 1e-6, 2e-6
    without = fit_with_blocks(logits, saliency, budget, settings(target_keep=0.6))
    gone = [(s.layer, s.name) for s, count in zip(space.structures, kept(space, without), strict=True) if not count]
    assert gone == [(2, "mlp"), (4, "kv_group")]
    assert abs(budget.share(without) - 0.6) < 0.002


def test_of_all_sets_of_blocks_none_is_much_cheaper():
    """By brute force over a small model: what is removed costs at most a tenth more than with the best set."""
    space = space_of(num_hidden_layers=3, intermediate_size=128)
    budget = Budget(space)
    for seed, together, target in itertools.product(range(3), (0.2, 0.6), (0.3, 0.6)):
        saliency = random_saliency(space, seed, together)
        each = torch.rand(len(space.structures), generator=torch.Generator().manual_seed(seed)) * 2
        saliency[space.size :] *= each
        options = settings(target_keep=target)
        worth, whole = worths(saliency, budget, options)
        logits = (worth / budget.cost()).log().float()

        def price(mask, worth=worth, whole=whole):
            empty = torch.tensor([not mask[s.span].any() for s in space.structures])
            return float(worth[~mask & ~empty[space.structure_of]].sum() + whole[empty].sum())

        best = torch.inf
        for chosen in itertools.product([False, True], repeat=len(space.structures)):
            if all(chosen):
                continue
            mask = fit_mask(logits, target, budget, RULES, torch.tensor(chosen))
            if abs(budget.share(mask) - target) < 0.01:
                best = min(best, price(mask))
        assert price(fit_with_blocks(logits, saliency, budget, options)) <= 1.1 * best


def test_logits_of_minus_infinity_leave_a_structure_empty_and_others_not():
    space = space_of()
    budget, logits = Budget(space), random_logits(Budget(space))
    empty = torch.zeros(len(space.structures), dtype=torch.bool)
    empty[[0, 3]] = True
    mask = exact_mask(logits.masked_fill(empty[space.structure_of], -torch.inf), 0.5, budget)
    assert [count == 0 for count in kept(space, mask)] == empty.tolist()
    assert 0.49 < budget.share(mask) <= 0.5
    with pytest.raises(NotReached, match="NaN or infinity"):
        fit_mask(logits.index_fill(0, torch.tensor([3]), -torch.inf), 0.5, budget, RULES, empty)


def test_targets_below_one_of_each_structure_are_in_reach_with_blocks_alone():
    budget = Budget(space_of(num_key_value_heads=1))
    assert nearest_share(budget, 0.1, RULES) > 0.14
    assert abs(nearest_share(budget, 0.1, RULES, blocks=True) - 0.1) < 0.002
    assert width_rules(budget, 0.1, None, "cpu") != width_rules(budget, 0.6, None, "cpu")
    assert width_rules(budget, 0.1, None, "cpu", blocks=True) == width_rules(budget, 0.6, None, "cpu")


def test_the_budget_counts_what_goes_with_a_block():
    """Two norms and two biases of 12: the bias and norm of a block go with its last decision, and not before."""
    space = MaskSpace.from_config(config(attention_bias=True, mlp_bias=True), "kv_group")
    budget, mask = Budget(space), torch.ones(space.size, dtype=torch.bool)
    for structure in space.layer(1):
        before = budget.kept(mask)
        each = int(budget.cost()[structure.start])
        mask[structure.start : structure.start + structure.size - 1] = False
        assert before - budget.kept(mask) == each * (structure.size - 1)
        before = budget.kept(mask)
        mask[structure.span] = False
        assert before - budget.kept(mask) == each + 24
    assert budget.with_block().tolist() == [24] * 4


def test_a_running_saliency_of_a_block_rests_where_a_part_of_it_is_removed():
    space = MaskSpace.from_config(config(), "kv_group")
    decisions = ScoredDecisions(space, settings(source="running", decay=0.5, multiples={}), search_steps=4)
    size = space.size + len(space.structures)
    decisions.observe(torch.ones(size))
    assert torch.equal(decisions.saliency, torch.full((size,), 0.5))
    mask = torch.ones(space.size, dtype=torch.bool)
    mask[space.structures[1].start] = False
    decisions.mask = mask
    decisions.observe(torch.full((size,), 2.5))
    assert decisions.saliency[space.size :].tolist() == [1.5, 0.5, 1.5, 1.5]
    assert decisions.saliency[: space.size].tolist() == [1.5 if value else 0.5 for value in mask]
    other = ScoredDecisions(space, settings(source="running", multiples={}), search_steps=4)
    other.load_state(decisions.state())
    assert torch.equal(other.at(0.5), decisions.at(0.5))
