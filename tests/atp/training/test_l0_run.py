"""A run under regularizer l0: gates that close, matter, and step with LoRA (test_kinds_of_run.py has the rest)."""

import pytest
import torch
from tiny_callbacks import Poison
from tiny_run import CUT, SETTLE, make, records, trained_tensors

L0 = {"regularizer": "l0", "beta": 0.01, "settle_beta": 3.0}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = make(folder, training=L0)
    trainer.train()
    return trainer, folder, trained_tensors(trainer)


@pytest.mark.parametrize("space", ["kv_group", "disp"])
def test_removed_groups_are_zero_at_the_end_of_settling(tmp_path, space):
    trainer = make(tmp_path, training=L0, decisions={"space": space})
    groups = trainer.pruning.uncut.groups
    left, fold = [], groups.prox_

    def watched(mask, threshold):
        fold(mask, threshold)
        left.append(groups.largest_removed_norm(mask))

    groups.prox_ = watched
    trainer.train()
    assert len(left) == SETTLE and left[0] > 0 and left[-1] == 0.0
    assert trainer.certificate["removed_lora_norm"] == 0.0 and trainer.certificate["masked_vs_cut"] < 1e-5


def test_gates_matter_and_draw_from_a_stream_of_their_own(unbroken, tmp_path):
    """The lasso's weight at zero leaves a run that differs by the gates alone: same first loss, another adapter."""
    _, folder, gated = unbroken
    without = make(tmp_path, training={"beta": 0, "settle_beta": 0})
    without.train()
    assert records(tmp_path)[0]["loss"] == records(folder)[0]["loss"], "B is zero at first, so gates do nothing yet"
    assert not all(torch.equal(tensor, gated[name]) for name, tensor in trained_tensors(without).items())


def test_gates_that_close_in_search_leave_nothing_for_settle(tmp_path):
    """With decisions that stand still 40 steps close all gates; a cut at the freeze would change nothing any more."""
    training, moved = {"search": 40, "settle": 2, "tune": 0, "save_every": 100}, {}
    for name, changes in {"l0": L0, "none": {"beta": 0, "settle_beta": 0}}.items():
        trainer = make(tmp_path / name, training=training | changes, decisions={"lr": 0.0})
        trainer.train()
        moved[name] = trainer.certificate["frozen_vs_cut"]
    penalties = [record["l0"] for record in records(tmp_path / "l0")]
    assert penalties[39] < 0.1 * max(penalties)
    assert moved["l0"] < 1e-5 < 1e-2 < moved["none"]


def test_gradient_checkpointing_sees_the_same_gates(unbroken, tmp_path):
    saving = make(tmp_path, training=L0 | {"gradient_checkpointing": True})
    saving.train()
    for name, tensor in trained_tensors(saving).items():
        torch.testing.assert_close(tensor, unbroken[2][name])


@pytest.mark.parametrize(
    ("training", "poisoned", "steps"),
    [({"gradient_accumulation": 2, "batch_size": 1}, None, CUT), ({}, Poison(2, 3), CUT - 2)],
    ids=["accumulated", "skipped"],
)
def test_gates_step_once_with_every_lora_step(tmp_path, training, poisoned, steps):
    trainer = make(tmp_path, training=L0 | training, callbacks=[poisoned] if poisoned else [])
    gates = trainer.pruning.uncut.regularizer
    trainer.train()
    assert int(gates.state_dict()["step"]) == steps and trainer.finite.skipped == CUT - steps
