"""A slice of `make chaos`: a few kills in whole runs, and checkpoints damaged at random."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chaos_damage import damaged_checkpoints
from chaos_faults import KINDS, PAIRED, faults
from chaos_kills import kills

from atp.training.checkpoint import Checkpoint, save

CHAOS = Path(__file__).parent


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
def test_a_few_kills_and_other_faults():
    done = subprocess.run(
        [sys.executable, str(CHAOS), "--kills", "2", "--faults", "0.025", "--damaged", "40", "--seed", "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    all_kinds = re.search(r"^\| all \| (\d+) \| (\d+) \| (\d+) \| 0 \|$", done.stdout, re.MULTILINE)
    one, two, survived = map(int, all_kinds.groups())
    assert one + two == survived > 2


def test_every_kind_of_fault_is_drawn_in_one_process_and_some_in_two():
    every = faults(1.0, random.Random(0))
    assert {fault.kind for fault in every} == KINDS.keys()
    assert {fault.kind for fault in every if fault.processes == 2} == set(PAIRED)
    assert len(every) + len(kills(90, random.Random(0))) >= 200
