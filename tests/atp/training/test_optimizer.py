"""AdamW over one flat tensor, whose updates are clipped: by the formula, and in no step that is skipped."""

import copy
import math

import pytest
import torch
from tiny_run import TUNE, make, trained_tensors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from atp.config import TrainingConfig
from atp.ground.errors import InputError
from atp.lora.packs import Packs
from atp.processes.finite import FiniteGuard
from atp.training import loop
from atp.training.flat import BLOCK, FlatParameters, NarrowFactors
from atp.training.optimizer import CLIPS, adamw

SHAPES = ((4, 24), (40, 4), (1, 1))
RANK = 3  # no other side of the tiny model
LR, BETA1, BETA2, EPS = 1e-2, 0.9, 0.95, 1e-8


def made(clipped=True, shapes=SHAPES):
    rng = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]
    optimizer = adamw(FlatParameters({str(i): p for i, p in enumerate(parameters)}), TrainingConfig(beta2=BETA2))
    optimizer.param_groups[0] |= {"lr": LR, CLIPS: clipped}
    return parameters, optimizer


def gradients(step, factor=1.0):
    rng = torch.Generator().manual_seed(step)
    return [factor * torch.randn(shape, generator=rng) for shape in SHAPES]


def stepped(parameters, optimizer, values):
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(value)
        parameter.grad.copy_(value)
    FiniteGuard(5).check(optimizer, 1)
    optimizer.step()


class Formula:
    """The definition, in float64, a matrix at a time."""

    def __init__(self, parameters):
        self.values = [p.detach().double() for p in parameters]
        self.states = [[torch.zeros_like(value), torch.zeros_like(value)] for value in self.values]
        self.steps, self.largest = 0, 0.0

    def step(self, gradients):
        self.steps += 1
        for value, state, gradient in zip(self.values, self.states, gradients, strict=True):
            g = gradient.double()
            state[0] = BETA1 * state[0] + (1 - BETA1) * g
            state[1] = BETA2 * state[1] + (1 - BETA2) * g**2
            m, v = state[0] / (1 - BETA1**self.steps), state[1] / (1 - BETA2**self.steps)
            rms = math.sqrt(float((g / (v.sqrt() + EPS)).square().mean()))
            value -= LR / max(1.0, rms) * m / (v.sqrt() + EPS)
            self.largest = max(self.largest, rms)


def test_a_step_is_that_of_the_formula():
    """Also where a gradient is zero at first, as those of A are while B is zero, and where one is ten times larger."""
    parameters, optimizer = made()
    formula = Formula(parameters)
    for step in range(30):
        values = gradients(step, 10.0 if step == 20 else 1.0)
        if step < 2:
            values[0].zero_()
        stepped(parameters, optimizer, values)
        formula.step(values)
    assert formula.largest > 2
    for parameter, value in zip(parameters, formula.values, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_skipped_changes_nothing_and_the_next_is_as_if_there_had_been_none(bad):
    runs = [made() for _ in range(2)]
    for parameters, optimizer in runs:
        stepped(parameters, optimizer, gradients(0))
    parameters, optimizer = runs[0]
    values = gradients(1)
    values[1][3, 1] = bad
    before = [p.detach().clone() for p in parameters]
    stepped(parameters, optimizer, values)
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))
    for parameters, optimizer in runs:
        stepped(parameters, optimizer, gradients(2, 5.0))
    assert all(torch.equal(one, other) for one, other in zip(runs[0][0], runs[1][0], strict=True))


def test_parameters_without_gradient_or_elements_are_left_alone():
    parameters, optimizer = made(shapes=((4, 24), (0, 4), (3, 3)))
    optimizer.step()
    before = parameters[2].detach().clone()
    for parameter in parameters[:2]:
        parameter.grad.fill_(1)
    optimizer.step()
    assert torch.equal(parameters[2], before) and torch.isfinite(parameters[0]).all()


def test_a_step_that_does_not_clip_is_torchs_own():
    parameters, optimizer = made(clipped=False)
    theirs = [nn.Parameter(p.detach().clone()) for p in parameters]
    plain = torch.optim.AdamW(theirs, lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0, fused=True)
    for step in range(5):
        stepped(parameters, optimizer, gradients(step, 10.0 if step == 3 else 1.0))
        stepped(theirs, plain, gradients(step, 10.0 if step == 3 else 1.0))
    assert all(torch.equal(one, other) for one, other in zip(parameters, theirs, strict=True))


@pytest.mark.parametrize(
    ("asked", "scored", "clips"),
    [(None, 31.9, True), (None, 32, False), (True, 500, True), (False, 8, False)],
)
def test_few_tokens_with_a_loss_clip_updates_where_nobody_says(asked, scored, clips):
    assert TrainingConfig(update_clipping=asked).clips_updates(scored) == clips


def flat_of(*shapes, dtype=torch.float32):
    parameters = {f"p{i}": nn.Parameter(torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)}
    values = {name: p.detach().clone() for name, p in parameters.items()}
    return FlatParameters(parameters), parameters, values


def test_parameters_are_views_with_their_values():
    flat, parameters, values = flat_of((4, 24), (0, 4), (BLOCK,), ())
    assert all(torch.equal(p, values[name]) and p.is_leaf for name, p in parameters.items())
    assert flat.flat.numel() == 3 * BLOCK
    with torch.no_grad():
        flat.flat.add_(1)
    assert all(torch.equal(p, values[name] + 1) for name, p in parameters.items())
    sum(p.square().sum() for p in parameters.values()).backward()
    assert torch.equal(flat.flat.grad.view(-1, BLOCK)[0, :96], 2 * parameters["p0"].detach().flatten())
    assert not flat.flat.grad[96:BLOCK].any(), "what fills a parameter up has no gradient"


def test_what_somebody_takes_away_is_back_after_a_step():
    flat, parameters, values = flat_of((4, 24), (3,), (0, 4))
    for parameter in parameters.values():
        parameter.grad, parameter.data = None, parameter.data + 1
    flat.zero_grad()
    sum(p.sum() for p in parameters.values()).backward()
    assert flat.flat.grad.sum() == 99
    with torch.no_grad():
        flat.flat.add_(1)
    assert all(torch.equal(p, values[name] + 1 + 1) for name, p in parameters.items())


def test_state_goes_by_name_and_comes_back():
    flat, parameters, _ = flat_of((4, 24), (0, 4), ())
    optimizer = adamw(flat, TrainingConfig())
    assert flat.state_of(optimizer) == {}
    flat.load_state(optimizer, {})
    sum(p.square().sum() for p in parameters.values()).backward()
    optimizer.step()
    state = flat.state_of(optimizer)
    assert {name: value.shape for name, value in state.items() if name.endswith("exp_avg")} == {
        f"{name}.exp_avg": p.shape for name, p in parameters.items()
    }
    assert all(state[f"{name}.step"] == 1 for name in parameters)
    again, _, _ = flat_of((4, 24), (0, 4), ())
    other = adamw(again, TrainingConfig())
    again.load_state(other, {name: value.clone() for name, value in state.items()})
    for key, value in optimizer.state[flat.flat].items():
        assert torch.equal(other.state[again.flat][key], value), key


class Casts(TorchDispatchMode):
    """Counts casts of LoRA factors and of their gradients, which alone have a side of the adapter's rank."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        cast = func._schema.name == "aten::_to_copy" and args[0].is_floating_point()
        self.count += cast and RANK in args[0].shape
        return func(*args, **kwargs or {})


def casts_in_a_step(folder, phase, **overrides):
    training = {"precision": "bfloat16", "save_every": 100} | overrides.pop("training", {})
    trainer = make(folder, training=training, lora={"r": RANK}, **overrides)
    counts, loss, backward = [], trainer.loss, trainer.backward

    def counted(function):
        def call(*given):
            with Casts() as casts, torch.autograd.set_multithreading_enabled(False):
                result = function(*given)
            if trainer.phase == phase:
                counts.append(casts.count)
            return result

        return call

    trainer.loss, trainer.backward = counted(loss), counted(backward)
    trainer.train()
    return sum(counts), trained_tensors(trainer)


@pytest.mark.parametrize(
    "overrides",
    [
        {"decisions": {"source": "running", "space": "kv_group"}, "training": {"open": 3, "search": 0, "settle": 0}},
        {"training": {"open": 2, "gradient_accumulation": 2, "regularizer": "l0"}},
        {"training": {"gradient_checkpointing": True}},
    ],
)
def test_factors_are_cast_at_once(tmp_path, monkeypatch, overrides):
    """Not one by one, and steps change no bit."""
    monkeypatch.setattr(Packs, "of", lambda *given: None)  # which cast what they read
    before, expected = casts_in_a_step(tmp_path / "each", "tune", **copy.deepcopy(overrides))
    monkeypatch.setattr(loop, "CASTS_ON", ("cpu",))
    casts, found = casts_in_a_step(tmp_path / "at once", "tune", **copy.deepcopy(overrides))
    assert before >= 4 * 14 * TUNE and casts == 0
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_gradients_of_some_factors_reach_their_parameters():
    flat, parameters, values = flat_of((4, 24), (3,), (0, 4))
    narrow = NarrowFactors(flat, [], torch.bfloat16)
    narrow._leaves[1].grad = torch.full((3,), 2.0, dtype=torch.bfloat16)
    narrow.collect()
    narrow.collect()
    assert parameters["p1"].grad.tolist() == [2, 2, 2] and flat.flat.grad.sum() == 6
    with torch.no_grad():
        flat.flat.add_(1)
    narrow.refresh()
    assert torch.equal(narrow._leaves[0], (values["p0"] + 1).to(torch.bfloat16))


@pytest.mark.parametrize("dtypes", [(), (torch.float32, torch.float64)])
def test_none_and_mixed_ones_are_refused(dtypes):
    parameters = {str(dtype): nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes}
    with pytest.raises(InputError, match="no trainable|float32 and float64"):
        FlatParameters(parameters)
