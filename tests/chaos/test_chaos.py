"""A slice of `make chaos`: a few kills in whole runs, and checkpoints damaged at random."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chaos_damage import damaged_checkpoints

from atp.training.checkpoint import Checkpoint, save

CHAOS = Path(__file__).parents[1] / "chaos.py"


@pytest.mark.parametrize("seed", range(3))
def test_damaged_checkpoints_give_way_to_the_one_before_or_to_a_sentence(tmp_path, seed):
    for step in (1, 2, 3):
        tensors = {"model.a": torch.full((2, 3), float(step)), "mask": torch.tensor([True, False])}
        values = {"frozen": False, "clock": {"search": 1.5 * step}, "scheduler": {"_last_lr": [step * 1e-3]}}
        save(tmp_path / "whole", Checkpoint(step, tensors, values), keep=3)
    found = damaged_checkpoints(tmp_path / "whole", 60, random.Random(seed))
    assert found.problems == []
    assert found.outcomes["taken from the one before, and named"] > 20 < sum(found.outcomes.values()) == 60


@pytest.mark.slow
def test_a_few_kills():
    done = subprocess.run(
        [sys.executable, str(CHAOS), "--kills", "4", "--damaged", "40", "--seed", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "4 of 4 broken runs ended with the bytes of an unbroken one." in done.stdout
