"""Hard concrete gates against the formulas of arXiv 1712.01312 and against factors that are multiplied by hand."""

import math

import pytest
import torch
from tiny_lora import masked, random_mask, tokens
from torch.testing import assert_close

from atp.decide.sampling import logistic_noise
from atp.lora.controller import MaskController
from atp.lora.regularizers.l0 import L0Gates, hard_concrete, open_probability

GAMMA, ZETA, TEMPERATURE = -0.1, 1.1, 2 / 3
LOG_ALPHA = torch.tensor([-4.0, -2.0, -0.5, 0.0, 1.0, 2.0, 3.5], dtype=torch.float64)
SEED = 5


def test_open_probability_and_its_gradient():
    """z > 0 where s > -gamma / (zeta - gamma), that is u > sigmoid(temperature * logit(that) - log_alpha)."""
    threshold = -GAMMA / (ZETA - GAMMA)
    logit = math.log(threshold / (1 - threshold))
    expected = [1 - 1 / (1 + math.exp(a - TEMPERATURE * logit)) for a in LOG_ALPHA.tolist()]
    log_alpha = LOG_ALPHA.clone().requires_grad_()
    probability = open_probability(log_alpha)
    probability.sum().backward()
    assert_close(probability.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    slope = torch.tensor([p * (1 - p) for p in expected], dtype=torch.float64)
    assert_close(log_alpha.grad, slope, rtol=1e-12, atol=0)


def test_samples_are_open_as_often_as_the_formula_says():
    count = 200_000
    noise = logistic_noise(count, torch.Generator().manual_seed(0)).double()
    for log_alpha in LOG_ALPHA:
        gates = hard_concrete(log_alpha.expand(count), noise)
        assert 0 <= float(gates.min()) and float(gates.max()) <= 1
        p = float(open_probability(log_alpha))
        assert float((gates > 0).double().mean()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count))
        # z = 1 mirrors z = 0, the interval being stretched alike at both ends.
        p = float(1 - open_probability(-log_alpha))
        assert float((gates == 1).double().mean()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count))


def test_test_time_gates():
    log_alpha = torch.tensor([-math.log(11) - 1e-6, -math.log(11) + 1e-6, 0.0, math.log(11) + 1e-6]).double()
    gates = hard_concrete(log_alpha)
    assert gates[0] == 0 and gates[1] > 0
    assert_close(gates[2:], torch.tensor([0.5, 1.0], dtype=torch.float64))


@pytest.fixture(params=["head_dim", "kv_group", "disp"])
def case(request):
    """A model with LoRA, a mask that removes some decisions, and gates from closed to open."""
    model, space = masked(space_name=request.param)
    gates = L0Gates(model, space, seed=SEED)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.linspace(-5, 4, len(gates.log_alpha))[torch.randperm(len(gates.log_alpha))])
    return model, space, gates, random_mask(space)


def by_hand(model, space, mask, values):
    """Yields (factor, gate of each of its rows or columns as a column or row, their gate ids, axis) of every cut.

    values: one a gate. What is kept gets 1. Gates lie in the order of structures, cuts and decisions.
    """
    parameters, start = dict(model.named_parameters()), 0
    for structure in space.structures:
        for cut in structure.cuts:
            name = f"base_model.model.model.layers.{structure.layer}.{cut.module}"
            factor = parameters[f"{name}.lora_{'A' if cut.axis else 'B'}.default.weight"]
            owners = cut.owner.tolist()
            ids = [start + owner if not mask[structure.start + owner] else None for owner in owners]
            gate = torch.tensor([1.0 if i is None else float(values[i]) for i in ids])
            yield factor, gate if cut.axis else gate[:, None], ids, cut.axis
            start += structure.size


def test_penalty_counts_removed_cuts_alone(case):
    _, space, gates, mask = case
    leaf = gates.log_alpha.detach().double().requires_grad_()
    removed = [~mask[structure.span] for structure in space.structures for _ in structure.cuts]
    expected = torch.sigmoid(leaf - TEMPERATURE * math.log(-GAMMA / ZETA))[torch.cat(removed)].sum()
    penalty = gates.penalty(mask)
    for value in (penalty, expected):
        value.backward()
    assert float(penalty.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert_close(gates.log_alpha.grad, leaf.grad.float(), rtol=1e-5, atol=1e-7)


def loss_of(model):
    return model(input_ids=tokens(), labels=tokens()).loss


def test_sampled_gates_scale_removed_rows_and_columns(case):
    """A LoRA step has the loss and gradients that it has with factors multiplied by hand."""
    model, space, gates, mask = case
    log_alpha = gates.log_alpha.detach().clone()
    controller = MaskController(model, space)
    with controller.masks(mask, "hard"), gates.applied(mask, sample=True):
        loss = loss_of(model)
        loss.backward()
    trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    noise = logistic_noise(len(log_alpha), torch.Generator().manual_seed(SEED))
    s = torch.sigmoid((log_alpha + noise) / TEMPERATURE)
    values = (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    slope = torch.where((values > 0) & (values < 1), (ZETA - GAMMA) * s * (1 - s) / TEMPERATURE, 0)
    assert 0 < int((values == 0).sum()) < len(values) and 0 < int((slope > 0).sum())
    model.zero_grad()
    plain = {}
    for factor, gate, _, _ in by_hand(model, space, mask, values):
        plain[id(factor)] = factor.detach().clone()
        factor.data.mul_(gate)
    with controller.masks(mask, "hard"):
        expected = loss_of(model)
        expected.backward()
    assert_close(loss, expected, rtol=1e-6, atol=0)
    names = {id(p): n for n, p in model.named_parameters()}
    expected_slope = torch.zeros(len(values))
    for factor, gate, ids, axis in by_hand(model, space, mask, values):
        assert_close(trained[names[id(factor)]], factor.grad * gate, rtol=1e-4, atol=1e-6)
        for place, gate_id in enumerate(ids):
            if gate_id is not None:
                part = (factor.grad * plain[id(factor)]).select(axis, place)
                expected_slope[gate_id] += slope[gate_id] * part.sum()
    assert_close(gates.log_alpha.grad, expected_slope, rtol=1e-3, atol=1e-6)


def test_outside_a_block_there_are_no_gates(case):
    model, _, gates, mask = case
    before = loss_of(model)
    for sample in (True, False):
        with gates.applied(mask, sample=sample):
            assert loss_of(model) != before
        assert loss_of(model) == before


def test_closed_gates_are_folded_in_and_change_nothing(case):
    """With gates either closed or whole at test time, folding leaves the gated model as it was."""
    model, space, gates, mask = case
    with torch.no_grad():
        gates.log_alpha.copy_(torch.where(torch.arange(len(gates.log_alpha)) % 3 == 0, -2.5, 2.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad(), gates.applied(mask, sample=False):
        expected = loss_of(model)
    gates.fold(mask)
    assert_close(loss_of(model).detach(), expected, rtol=1e-6, atol=0)
    names, zeros = {id(p): n for n, p in model.named_parameters()}, 0
    for factor, gate, _, _ in by_hand(model, space, mask, hard_concrete(gates.log_alpha.detach())):
        assert torch.equal(factor.detach(), before[names[id(factor)]] * gate)
        zeros += int((gate == 0).sum())
    assert zeros > 0


def test_what_is_removed_again_starts_with_an_open_gate(case):
    _, _, gates, mask = case
    with gates.applied(mask, sample=True):
        pass
    removed = ~mask[gates._decision_of_gate]
    assert (gates.log_alpha.detach()[~removed] == 2.0).all() and (gates.log_alpha.detach()[removed] != 2.0).all()
    assert float(open_probability(gates.log_alpha.detach()[~removed]).min()) > 0.97


@pytest.mark.parametrize("what", ["skipped", "non-finite"])
def test_a_bad_step_changes_nothing(case, what):
    model, _, gates, mask = case
    skip = torch.zeros(())
    for bad in (False, True):
        with gates.applied(mask, sample=True):
            loss_of(model).backward()
        before = {name: value.clone() for name, value in gates.state_dict().items()}
        if bad and what == "non-finite":
            gates.log_alpha.grad[0] = float("nan")
        gates.after_step(mask, 0.1, skip + 1 if bad and what == "skipped" else skip)
        after = gates.state_dict()
        same = [torch.equal(after[name], before[name]) for name in before if name != "noise"]
        assert all(same) if bad else not any(same)


def test_the_penalty_alone_closes_removed_gates_in_some_twenty_steps():
    model, space = masked()
    gates, mask = L0Gates(model, space, seed=SEED), random_mask(space)
    for _ in range(22):
        gates.after_step(mask, 0.01, torch.zeros(()))
    closed = hard_concrete(gates.log_alpha.detach()) == 0
    assert torch.equal(closed, ~mask[gates._decision_of_gate])
