"""The decision generator: a function of its seed alone, trained through encoder and heads."""

import pytest
import torch
from tiny_spaces import config

from atp.decide.generator import DecisionGenerator
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
