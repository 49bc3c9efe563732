"""The budget against counting parameters, and its loss against finite differences."""

import math

import pytest
import torch
from tiny_spaces import config

from atp.decide.budget import Budget
from atp.decide.sampling import keep_one
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
