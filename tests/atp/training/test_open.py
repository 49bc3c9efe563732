"""The open phase and the sources of decisions: order, what they see, and bit-exact resume."""

import json

import pytest
import torch
from tiny_run import make, trained_tensors

from atp.data.batches import collate
from atp.decide.budget import Budget
from atp.decide.maker import frozen
from atp.decide.saliency import fisher_saliency
from atp.training import checkpoint as checkpoints

OPEN, SEARCH, SETTLE, TUNE = 3, 2, 1, 3
FULL = {
    "open": OPEN, "search": SEARCH, "settle": SETTLE, "tune": TUNE, "distill": 0.5, "beta2": 0.9,
    "update_clipping": True,
}  # fmt: skip
AT_ONCE = FULL | {"search": 0, "settle": 0}
CASES = {
    "static": (FULL, {"source": "static"}),
    "tuned": (AT_ONCE, {"source": "tuned"}),
    "running": (FULL, {"source": "running", "every": 2}),
    "running at once": (AT_ONCE, {"source": "running"}),
    "in rounds": (AT_ONCE, {"source": "running", "rounds": 3}),
    "learned": (FULL, {"source": "learned"}),
}


@pytest.fixture(scope="module", params=CASES)
def finished(request, tmp_path_factory):
    training, decisions = CASES[request.param]
    folder = tmp_path_factory.mktemp("run")
    trainer = make(folder, training=training, decisions=decisions)
    trainer.train()
    return trainer, folder, training, decisions


def test_a_run_meets_budget_and_certificate(finished, tmp_path):
    trainer, folder, training, decisions = finished
    assert abs(Budget(trainer.space).share(trainer.decisions.mask) - 0.6) < 0.02
    certificate = trainer.export(tmp_path / "out")
    assert certificate["removed_lora_norm"] == 0.0
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    phases = ["open", "search", "settle", "tune"]
    assert [r["phase"] for r in records] == [phase for phase in phases for _ in range(training[phase])]
    assert ["keep" in r for r in records] == [r["phase"] in ("search", "settle") for r in records]


def test_resume_is_bit_exact_from_every_checkpoint(finished, tmp_path):
    trainer, folder, training, decisions = finished
    expected = trained_tensors(trainer)
    saved = sorted((folder / "checkpoints").glob("checkpoint-*"))
    assert len(saved) >= OPEN + TUNE
    for number, path in enumerate(saved[:-1]):
        state = checkpoints.load(path)
        state.meta["config"]["output_dir"] = str(tmp_path / str(number))
        checkpoints.save(tmp_path / str(number) / "checkpoints", state, keep=1)
        resumed = make(tmp_path / str(number), training=training, decisions=decisions)
        torch.manual_seed(999)
        resumed.train(resume=True)
        assert torch.equal(resumed.decisions.mask, trainer.decisions.mask), path
        assert all(torch.equal(t, expected[name]) for name, t in trained_tensors(resumed).items()), path


def test_saliency_is_taken_where_its_source_says(tmp_path):
    """static on the weights as they came, tuned on those that the open phase left."""
    found = {}
    for source in ("static", "tuned"):
        trainer = make(tmp_path / source, training=AT_ONCE, decisions={"source": source})
        steps = []
        take = trainer.pruning.start
        trainer.pruning.start = lambda trainer=trainer, take=take, steps=steps: (steps.append(trainer.step), take())
        trainer.train()
        found[source] = steps, trainer.pruning.decisions.saliency
    assert found["static"][0] == [0] and found["tuned"][0] == [OPEN]
    assert not torch.equal(found["static"][1], found["tuned"][1])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("space", ["kv_group", "head_dim", "disp"])
def test_the_running_saliency_is_that_of_the_samples_of_a_lora_step(tmp_path, size, space):
    """With one step and no decay it is the Fisher saliency of that step's samples, and the step is a plain one."""
    training = {"open": 1, "search": 1, "settle": 1, "tune": 0, "warmup": 0, "batch_size": size}
    decisions = {"source": "running", "decay": 0.0, "space": space}
    running = make(tmp_path / "running", training=training, decisions=decisions)
    plain = make(tmp_path / "plain", training=training, decisions=decisions | {"source": "tuned"})
    (batch,) = next(plain.batches_from(0))
    rows = zip(batch["input_ids"], batch["labels"], strict=True)
    samples = [collate([{"input_ids": ids, "labels": labels}]) for ids, labels in rows]
    with frozen(plain.model):
        expected = fisher_saliency(plain.space, samples, plain.pruning.calibration_loss)
    plain.pruning.uncut.controller.clear()
    seen = []
    running.pruning.decisions.observe = seen.append
    for trainer in (running, plain):
        trainer.train()
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-12)


def test_open_steps_are_those_of_plain_lora(tmp_path):
    """Whatever watches them: weights after them are the same to rounding."""
    ends = {}
    for source in ("tuned", "running"):
        trainer = make(tmp_path / source, training=AT_ONCE, decisions={"source": source}, lora={"dropout": 0.0})
        trainer.train()
        state = checkpoints.load(tmp_path / source / "checkpoints" / f"checkpoint-{OPEN - 1:08d}")
        ends[source] = state.part("model")
    for name, value in ends["tuned"].items():
        torch.testing.assert_close(ends["running"][name], value, rtol=1e-4, atol=1e-6)


def test_decisions_come_from_enough_open_steps_by_themselves(tmp_path, monkeypatch):
    """Three steps of two batches, as many as would be measured: nothing is, and the mask is that of source running."""
    monkeypatch.setattr("atp.training.pruning.fisher_saliency", None)
    ends = {}
    for source in (None, "running"):
        decisions = {"source": source, "saliency_windows": 2 * OPEN}
        training = AT_ONCE | {"batch_size": 1, "gradient_accumulation": 2}
        trainer = make(tmp_path / str(source), training=training, decisions=decisions, lora={"dropout": 0.0})
        trainer.train()
        assert trainer.pruning.decisions.saliency.count_nonzero()
        ends[source] = trainer.decisions.mask
    assert torch.equal(ends[None], ends["running"])


def test_a_step_of_several_batches_is_watched_in_each(tmp_path):
    training = AT_ONCE | {"gradient_accumulation": 2, "batch_size": 1}
    trainer = make(tmp_path, training=training, decisions={"source": "running"})
    seen = []
    trainer.pruning.decisions.observe = seen.append
    trainer.train()
    assert len(seen) == 2 * OPEN
