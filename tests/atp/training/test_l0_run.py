"""A run under regularizer l0: records, certificate, resume, guards, and gates that close."""

import json

import pytest
import torch
from tiny_callbacks import Poison
from tiny_run import CUT, SEARCH, SETTLE, TUNE, make, trained_tensors

from atp.training import checkpoint as checkpoints

L0 = {"regularizer": "l0", "beta": 0.01, "settle_beta": 3.0}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = make(folder, training=L0)
    trainer.train()
    return trainer, folder, trained_tensors(trainer)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_records_hold_the_penalty_in_the_place_of_the_lasso(unbroken):
    _, folder, _ = unbroken
    assert ["l0" in record for record in records(folder)] == [True] * CUT + [False] * TUNE
    assert not any("lasso" in record for record in records(folder))
    assert all(record["l0"] > 0 for record in records(folder)[:CUT])


@pytest.mark.parametrize("space", ["head_dim", "kv_group", "disp"])
def test_removed_groups_are_zero_and_the_cut_changes_nothing(tmp_path, space):
    trainer = make(tmp_path, training=L0, decisions={"space": space})
    groups = trainer.pruning.uncut.groups
    left, fold = [], groups.prox_

    def watched(mask, threshold):
        fold(mask, threshold)
        left.append(groups.largest_removed_norm(mask))

    groups.prox_ = watched
    trainer.train()
    assert len(left) == SETTLE and left[0] > 0 and left[-1] == 0.0
    certificate = trainer.export(tmp_path / "out")
    assert certificate["removed_lora_norm"] == 0.0
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    assert certificate["frozen_vs_cut"] > 10 * certificate["masked_vs_cut"], "removed LoRA groups had learnt something"


@pytest.mark.parametrize("step", [2, SEARCH, SEARCH + 1, CUT, CUT + 2])
def test_resume_is_bit_exact(unbroken, tmp_path, step):
    trainer, folder, expected = unbroken
    loaded = checkpoints.load(folder / "checkpoints" / f"checkpoint-{step:08d}")
    loaded.meta["config"]["output_dir"] = str(tmp_path)
    checkpoints.save(tmp_path / "checkpoints", loaded, keep=1)
    resumed = make(tmp_path, training=L0)
    torch.manual_seed(999)  # what the process did before must not matter
    resumed.train(resume=True)
    assert torch.equal(resumed.decisions.mask, trainer.decisions.mask)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(resumed).items())
    penalties = [record["l0"] for record in records(folder)[step:CUT]]
    assert [record["l0"] for record in records(tmp_path)[: len(penalties)]] == penalties


def test_gates_matter_and_draw_from_a_stream_of_their_own(unbroken, tmp_path):
    """The lasso's weight at zero leaves a run that differs by the gates alone: same first loss, another adapter."""
    _, folder, gated = unbroken
    without = make(tmp_path, training={"beta": 0, "settle_beta": 0})
    without.train()
    assert records(tmp_path)[0]["loss"] == records(folder)[0]["loss"], "B is zero at first, so gates do nothing yet"
    assert not all(torch.equal(tensor, gated[name]) for name, tensor in trained_tensors(without).items())


def test_gates_that_close_in_search_leave_nothing_for_settle(tmp_path):
    """With decisions that stand still 60 steps close all gates; a cut at the freeze would change nothing any more."""
    training = {"search": 60, "settle": 2, "tune": 0, "save_every": 100}
    moved = {}
    for name, changes in {"l0": L0, "none": {"beta": 0, "settle_beta": 0}}.items():
        trainer = make(tmp_path / name, training=training | changes, decisions={"lr": 0.0})
        trainer.train()
        moved[name] = trainer.certificate["frozen_vs_cut"]
    penalties = [record["l0"] for record in records(tmp_path / "l0")]
    assert penalties[59] < 0.1 * max(penalties)
    assert moved["l0"] < 1e-5 < 1e-2 < moved["none"]


def test_gradient_checkpointing_sees_the_same_gates(unbroken, tmp_path):
    saving = make(tmp_path, training=L0 | {"gradient_checkpointing": True})
    saving.train()
    for name, tensor in trained_tensors(saving).items():
        torch.testing.assert_close(tensor, unbroken[2][name])


def test_gradient_accumulation_steps_the_gates_once_a_lora_step(tmp_path):
    trainer = make(tmp_path, training=L0 | {"gradient_accumulation": 2, "batch_size": 1})
    gates = trainer.pruning.uncut.regularizer
    trainer.train()
    assert int(gates.state_dict()["step"]) == CUT


def test_steps_that_are_skipped_leave_the_gates_alone(tmp_path):
    trainer = make(tmp_path, training=L0, callbacks=[Poison(2, 3)])
    gates = trainer.pruning.uncut.regularizer
    trainer.train()
    assert trainer.finite.skipped == 2 and int(gates.state_dict()["step"]) == CUT - 2
