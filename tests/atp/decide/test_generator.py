"""The decision generator, a function of its seed alone, and samples and straight-through masks in closed form."""

import pytest
import torch
from tiny_spaces import config

from atp.decide.generator import DecisionGenerator
from atp.decide.sampling import gumbel_noise, hard_mask, keep_one, logistic_noise, soft_mask, straight_through
from atp.spaces.space import MaskSpace

SPACE = MaskSpace.from_config(config())
NETWORKS = ["transformer", "gru"]
KINDS = [*NETWORKS, "free"]


@pytest.mark.parametrize("kind", NETWORKS)
def test_seed_decides_and_the_global_generator_is_left_alone(kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = DecisionGenerator(SPACE, kind=kind, seed=1).eval()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (DecisionGenerator(SPACE, kind=kind, seed=seed).eval() for seed in (1, 2))
    assert torch.equal(first(), again())
    assert not torch.allclose(first(), other())


def test_free_logits_are_one_parameter_a_decision():
    prior = torch.linspace(-2, 2, SPACE.size)
    generator = DecisionGenerator(SPACE, kind="free", prior=prior)
    assert {name: p.shape for name, p in generator.named_parameters()} == {"free": (SPACE.size,)}
    weights = torch.randn(SPACE.size, generator=torch.Generator().manual_seed(0))
    (generator() * weights).sum().backward()
    assert torch.equal(generator(), prior) and torch.equal(generator.free.grad, weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space_name", ["head_dim", "kv_group", "disp"])
def test_logits_start_at_the_prior_and_leave_it(kind, space_name):
    space = MaskSpace.from_config(config(), space_name)
    prior = torch.linspace(-2, 2, space.size)
    generator = DecisionGenerator(space, kind=kind, seed=3, prior=prior)
    assert generator().dtype == torch.float32
    fixed = {name: buffer.clone() for name, buffer in generator.named_buffers()}
    assert torch.equal(generator.train()(), prior) and torch.equal(generator.eval()(), prior)
    before = {name: p.detach().clone() for name, p in generator.named_parameters()}
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-2)
    weights = torch.randn(space.size, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the encoder hears of the loss through the heads, which are zero at first
        optimizer.zero_grad()
        (generator() * weights).sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in generator.named_parameters())
    assert all(torch.equal(buffer, fixed[name]) for name, buffer in generator.named_buffers())
    assert ((generator() - prior) * weights < 0).all(), "every logit moved against its gradient"
    prior.zero_()
    assert generator.prior[0] == -2, "the generator keeps its own copy"


def test_dropout_is_active_only_in_training():
    generator = DecisionGenerator(SPACE)
    torch.manual_seed(0)
    assert not torch.equal(generator.train()(), generator.train()())
    assert torch.equal(generator.eval()(), generator.eval()())


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
