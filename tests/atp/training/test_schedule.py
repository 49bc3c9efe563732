"""Phases, and learning rates against the schedules of transformers."""

import pytest
import torch
from transformers import get_scheduler

from atp.config import TrainingConfig
from atp.training.schedule import Phases, learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 20, 30])
@pytest.mark.parametrize("lr", [1e-3, 3.7e-4])
def test_learning_rates_are_those_of_transformers_step_by_step(schedule, warmup, lr):
    """Also for a warmup as long as the run, and longer."""
    config = TrainingConfig(search=9, settle=4, tune=7, schedule=schedule, warmup=warmup, lr=lr)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=config.total)
    for step in range(config.total):
        assert learning_rate(config, step) == optimizer.param_groups[0]["lr"], step
        optimizer.step()
        scheduler.step()


def test_phases_follow_each_other():
    phases = Phases(search=2, settle=1, tune=3)
    assert [phases.of(step) for step in range(phases.total)] == ["search"] * 2 + ["settle"] + ["tune"] * 3
    assert (phases.cut_step, phases.total) == (3, 6)
