"""Training is watched on a validation split, ends with the best adapter, and stops where nothing gets better."""

import pytest
import torch
from tiny_run import CUT, TOTAL, assert_same_end, make, place, ragged, records, separate, trained_tensors, windows
from torch.nn import functional as F

from atp.ground.errors import InputError
from atp.training.callbacks import Callback


def watched(folder, *, every=1, data=None, **options):
    """A trainer that scores five windows; options: those of `make`."""
    evaluation = {"every": every, "validation_windows": 5, "batch_size": 2}
    return make(folder, validation=data or windows(7, 9), evaluation=evaluation, **options)


class Snapshots(Callback):
    """The adapter after every step."""

    def __init__(self):
        self.taken = {}

    def on_step(self, loop, record):
        self.taken[loop.step] = trained_tensors(loop)


def scored(folder):
    return [record for record in records(folder) if "validation_loss" in record]


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    """A run that is scored after each step."""
    folder = tmp_path_factory.mktemp("each")
    trainer = watched(folder)
    trainer.train()
    return trainer, folder


def loss_of(model, dataset, count):
    """The mean loss per token by transformers alone."""
    ids = dataset.input_ids[:count]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_scores_are_the_models_loss_and_come_when_they_are_due(tmp_path):
    trainer = watched(tmp_path, every=3)
    trainer.train()
    found = scored(tmp_path)
    assert [record["step"] for record in found] == [3, 6, 9, TOTAL]
    assert [record["phase"] for record in found] == ["search", "settle", "tune", "tune"]
    assert found[-1]["validation_loss"] == pytest.approx(loss_of(trainer.model, windows(7, 9), 5), abs=1e-5)
    assert trainer.clock.seconds["validation"] > 0
    summary = trainer.validation.summary(trainer.step)["validation"]
    assert summary["last"] == found[-1]["validation_loss"] and summary["last_step"] == summary["kept_step"] == TOTAL


def test_scores_before_the_cut_are_those_under_the_mask(tmp_path):
    trainer = watched(tmp_path, training={"search": 4, "settle": 0, "tune": 1})
    trainer.train()
    states = trainer.validation.becoming
    assert set(states) == {"masked", "refitted", "cut"}
    assert states["cut"] == pytest.approx(states["refitted"], abs=1e-5), "the cut changes nothing"
    assert abs(states["refitted"] - states["masked"]) > 1e-4, "the refit changes the model"


def test_settling_ends_where_the_cut_begins(each):
    trainer, folder = each
    at_cut = next(record["validation_loss"] for record in scored(folder) if record["step"] == CUT)
    assert trainer.validation.becoming["cut"] == pytest.approx(at_cut, abs=1e-5)


def test_watching_changes_nothing(each, tmp_path):
    alone = make(tmp_path)
    alone.train()
    assert_same_end(each[0], alone)


def test_watching_draws_nothing_from_the_gates(tmp_path):
    runs = [make(tmp_path / "alone", training={"regularizer": "l0"})]
    runs.append(watched(tmp_path / "beside", training={"regularizer": "l0"}))
    for trainer in runs:
        trainer.train()
    assert_same_end(*runs[::-1])


@pytest.mark.parametrize(("packing", "data"), [("separate", separate(7, 9)), ("padded", ragged(7, 9))])
def test_windows_kept_apart_and_padded_rows_are_scored_too(tmp_path, packing, data):
    watched(tmp_path, data=data, training={"search": 1, "settle": 0, "tune": 1}).train()
    assert all(0 < record["validation_loss"] < 10 for record in scored(tmp_path)) and len(scored(tmp_path)) == 2


# A learning rate at which every step makes the held-out windows, which are noise, worse.
WORSE = {"lr": 0.1, "schedule": "constant", "warmup": 0, "clip": 100.0}


def test_the_run_ends_with_the_best_adapter(tmp_path):
    snapshots = Snapshots()
    trainer = watched(tmp_path, callbacks=[snapshots], training=WORSE | {"keep_best": True, "tune": 8})
    trainer.train()
    best = trainer.validation.best
    scores = {record["step"]: record["validation_loss"] for record in scored(tmp_path) if record["step"] > CUT}
    scores[CUT] = trainer.validation.becoming["cut"]
    assert best["step"] == min(scores, key=scores.get) < trainer.phases.total, "nothing got worse: no test of this"
    if best["step"] > CUT:
        for name, value in snapshots.taken[best["step"]].items():
            assert torch.equal(value, trainer.model.get_parameter(name)), name
    assert loss_of(trainer.model, windows(7, 9), 5) == pytest.approx(best["loss"], abs=1e-5)
    assert trainer.validation.summary(trainer.step)["validation"]["kept_step"] == best["step"]


def test_training_stops_when_nothing_gets_better_and_resumes_to_the_same(tmp_path):
    training = WORSE | {"keep_best": True, "patience": 2, "tune": 12, "keep_checkpoints": 30}
    whole = watched(tmp_path, training=training)
    whole.train()
    assert whole.step == whole.validation.best["step"] + 2 < whole.phases.total
    expected, score = trained_tensors(whole), whole.validation.state()
    steps = [record["step"] for record in records(tmp_path)]
    folders = sorted((tmp_path / "checkpoints").glob("checkpoint-*"), reverse=True)
    for newest in folders[::3]:  # from the end of the run back to its beginning
        (tmp_path / "checkpoints" / "LATEST").write_text(newest.name + "\n", encoding="utf-8")
        again = watched(tmp_path, training=training)
        again.train(resume=True)
        assert again.step == whole.step and again.validation.state() == score, newest
        for name, value in expected.items():
            assert torch.equal(value, again.model.get_parameter(name)), (newest, name)
        assert [record["step"] for record in records(tmp_path)] == steps, newest


@pytest.mark.parametrize(("every", "batch", "count"), [(40, 1, 6), (40, 2, 12), (1, 1, 1), (1000, 1, 30)])
def test_as_many_samples_are_scored_as_cost_little(tmp_path, every, batch, count):
    values = {"batch_size": batch, "gradient_accumulation": 1}
    trainer = make(tmp_path, validation=windows(30, 9), evaluation={"every": every}, training=values)
    assert trainer.validation.count == count


def test_another_validation_split_is_refused_on_resume(each, tmp_path):
    place(each[1], 2, tmp_path)
    with pytest.raises(InputError, match="validation"):
        watched(tmp_path, data=windows(7, 10)).train(resume=True)


def test_a_split_is_needed(tmp_path):
    with pytest.raises(InputError, match="pass `validation`"):
        make(tmp_path, evaluation={"every": 1})


@pytest.mark.parametrize("training", [{"keep_best": True}, {"patience": 3}])
def test_what_goes_by_scores_needs_them(tmp_path, training):
    with pytest.raises(
        InputError, match="^training.keep_best and training.patience go by validation scores: set evaluation.every$"
    ):
        make(tmp_path, training=training)
