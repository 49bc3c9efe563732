"""Samples and straight-through masks against their closed forms."""

import pytest
import torch
from tiny_spaces import config

from atp.decide.sampling import gumbel_noise, hard_mask, keep_one, logistic_noise, soft_mask, straight_through
from atp.spaces.space import MaskSpace

SPACE = MaskSpace.from_config(config())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noise_follows_from_the_uniform_draw_of_the_given_generator_alone():
    uniform = torch.rand(1000, generator=seeded()).double()
    gumbel, logistic = gumbel_noise(1000, seeded()), logistic_noise(1000, seeded())
    torch.testing.assert_close(gumbel.double(), -(-uniform.log()).log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logistic.double(), (uniform / (1 - uniform)).log(), rtol=1e-4, atol=1e-5)
    state = torch.get_rng_state()
    assert torch.equal(gumbel_noise(8, seeded(4)), gumbel_noise(8, seeded(4)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("noise", [gumbel_noise, logistic_noise])
@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-24])
def test_noise_is_finite_at_the_ends_of_the_interval(noise, uniform, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, generator: torch.full((size,), uniform))
    assert torch.isfinite(noise(3, seeded())).all()


@pytest.mark.parametrize("noise", [None, torch.randn(50, generator=seeded(3))], ids=["plain", "noisy"])
def test_soft_mask_and_its_gradient_are_those_of_the_tempered_sigmoid(noise):
    logits = torch.randn(50, generator=seeded(2)).requires_grad_()
    found = soft_mask(logits, 3.0, 0.4, noise)
    exact = 1 / (1 + (-(logits.double() + (0 if noise is None else noise) + 3.0) / 0.4).exp())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-7)
    gradients = (torch.autograd.grad(soft.sum(), logits)[0] for soft in (found, exact))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_hard_mask_thresholds_at_one_half():
    soft = torch.full((SPACE.size,), 0.6)
    soft[3], soft[4] = 0.5, 0.4999
    mask = hard_mask(torch.zeros(SPACE.size), soft, SPACE)
    assert mask.dtype == torch.bool and mask.tolist() == [i != 4 for i in range(SPACE.size)]


def test_keep_one_restores_the_largest_or_first_logit_of_an_empty_structure_only():
    logits = torch.randn(SPACE.size, generator=seeded(5))
    empty = torch.zeros(SPACE.size, dtype=torch.bool)
    kept = keep_one(empty, logits, SPACE)
    for structure in SPACE.structures:
        values = logits[structure.span].tolist()
        assert kept[structure.span].nonzero().flatten().tolist() == [values.index(max(values))]
    assert not empty.any(), "the mask that was given is left alone"
    assert torch.equal(keep_one(kept, logits, SPACE), kept)
    kept = keep_one(torch.zeros(SPACE.size, dtype=torch.bool), torch.full((SPACE.size,), -2.0), SPACE)
    assert kept.nonzero().flatten().tolist() == [structure.start for structure in SPACE.structures]


def test_straight_through_has_the_exact_hard_value_and_the_soft_gradient():
    logits = torch.randn(SPACE.size, generator=seeded(6)).requires_grad_()
    soft = soft_mask(logits, 0.0, 0.4)
    hard = hard_mask(logits, soft, SPACE)
    weights = torch.randn(SPACE.size, generator=seeded(7))
    value = straight_through(soft, hard)
    assert torch.equal(value.detach(), hard.float())
    (through,) = torch.autograd.grad((weights * value).sum(), logits, retain_graph=True)
    (direct,) = torch.autograd.grad((weights * soft).sum(), logits)
    torch.testing.assert_close(through, direct)
