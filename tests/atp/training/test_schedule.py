"""Phases, and learning rates against the schedules of transformers."""

import pytest
import torch
from pydantic import ValidationError
from tiny_run import make, records
from transformers import get_scheduler

from atp.config import TrainingConfig
from atp.training.optimizer import CLIPS
from atp.training.schedule import Phases, learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 20, 30])
def test_learning_rates_are_those_of_transformers_step_by_step(schedule, warmup):
    """Also for a warmup as long as the run, and longer."""
    lr = 3.7e-4
    config = TrainingConfig(search=9, settle=4, tune=7, schedule=schedule, warmup=warmup, lr=lr)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=config.total)
    for step in range(config.total):
        assert learning_rate(config, step) == optimizer.param_groups[0]["lr"], step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps": 400}, (133, 0, 0, 267)),
        ({"steps": 1}, (0, 0, 0, 1)),
        ({"steps": 30, "search": 6, "settle": 2}, (10, 6, 2, 12)),
        ({"steps": 30, "open": 0}, (0, 0, 0, 30)),
        ({"tune": 7}, (0, 0, 0, 7)),
        ({"open": 3, "search": 2, "settle": 1, "tune": 7, "steps": 1}, (3, 2, 1, 7)),
    ],
)
def test_phases_that_are_not_given_follow_from_the_steps(given, expected):
    config = TrainingConfig(**given)
    phases = Phases.from_config(config)
    assert (phases.open, phases.search, phases.settle, phases.tune) == expected
    assert phases.total == config.total == sum(expected) and phases.cut_step == sum(expected[:3])
    order = [phase for phase, count in zip(("open", "search", "settle", "tune"), expected, strict=True) if count]
    assert list(dict.fromkeys(phases.of(step) for step in range(phases.total))) == order


def test_phases_longer_than_the_run_are_refused_in_a_sentence():
    with pytest.raises(ValidationError, match="open, search and settle take 33 steps, more than steps .30.: raise it"):
        TrainingConfig(steps=30, search=20, settle=3)


@pytest.mark.parametrize("steps", [60, 400, 3000])
def test_the_second_moment_forgets_half_in_a_sixth_of_the_run(steps):
    assert TrainingConfig(steps=steps).second_moment ** (steps / 6) == pytest.approx(0.5)
    assert TrainingConfig(steps=10**6).second_moment == 0.999 and TrainingConfig(beta2=0.5).second_moment == 0.5


@pytest.mark.parametrize(
    ("lr", "scored", "expected"),
    [
        (None, 32, 2e-3),
        (None, 5000, 2e-3),
        (None, 8, 1e-3),
        (None, 2, 5e-4),
        (None, 0, 2e-3 / 32**0.5),
        (3e-3, 8, 3e-3),
        (3e-3, 64, 3e-3),
    ],
)
def test_few_tokens_with_a_loss_lower_the_rate_that_nobody_set(lr, scored, expected):
    assert TrainingConfig(lr=lr).rate(scored) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("training", "expected", "clips"),
    [
        ({"lr": None, "gradient_accumulation": 4}, 2e-3 * (3 * 2 * 4 / 32) ** 0.5, True),
        ({"lr": None, "batch_size": 16}, 2e-3, False),
        ({}, 1e-2, True),
    ],
)
def test_steps_take_rate_and_clipping_of_their_tokens_with_a_loss(tmp_path, training, expected, clips):
    """Each sample has three, and a batch two samples unless it says otherwise."""
    phases = {"search": 1, "settle": 0, "tune": 1, "warmup": 0}
    trainer = make(tmp_path, data={"packing": "padded"}, training=phases | training | {"schedule": "constant"})
    trainer.train()
    group, last = trainer.adamw.param_groups[0], records(tmp_path)[-1]
    assert group["lr"] == last["lr"] == pytest.approx(expected, rel=1e-12)
    assert group[CLIPS] == clips
