"""Runs of every kind: budget, certificate, records, bit-exact resume; and what the sources of decisions see."""

import pytest
import torch
from tiny_run import CUT, SEARCH, SETTLE, TUNE, assert_same_end, make, records, resumed
from transformers import AutoModelForCausalLM

from atp.data.batches import collate
from atp.decide.budget import Budget
from atp.decide.maker import frozen
from atp.decide.saliency import fisher_saliency
from atp.training import checkpoint as checkpoints

OPEN = 3
DEFAULT = {"open": 0, "search": SEARCH, "settle": SETTLE, "tune": TUNE}
FULL = {
    "open": OPEN, "search": 2, "settle": 1, "tune": 3, "beta2": 0.9, "update_clipping": True,
}  # fmt: skip
AT_ONCE = FULL | {"search": 0, "settle": 0}
# The settings of training and decisions, other sections, and the steps from which runs are resumed: in each phase and
# where it ends, where saliency is taken and at the cut.
CASES = {
    "static": (FULL, {"source": "static"}, {}, [2, 5]),
    "tuned": (AT_ONCE, {"source": "tuned"}, {}, [2, 3]),
    "running": (FULL, {"source": "running", "every": 2}, {}, [2, 4, 6]),
    "in rounds": (AT_ONCE, {"source": "running", "rounds": 3}, {}, [2, 3]),
    "learned": (FULL, {"source": "learned"}, {}, [2, 3, 4, 6, 7]),
    "penalty": (DEFAULT, {"init": "paper", "budget": "penalty"}, {}, [3]),
    # The saliency of so small a model spares attention.
    "disp": (DEFAULT, {"space": "disp", "refit_windows": 3, "init": "paper"}, {}, [2, SEARCH + 1, CUT]),
    "rslora": (FULL, {"source": "running"}, {"lora": {"variant": "rslora"}}, [2, 4, 6]),
    "dora": (AT_ONCE, {"source": "running", "rounds": 3}, {"lora": {"variant": "dora"}}, [2, 3, 5]),
    "dora, static": (AT_ONCE, {"source": "static"}, {"lora": {"variant": "dora"}}, [2]),
    "l0": (DEFAULT | {"regularizer": "l0", "beta": 0.01, "settle_beta": 3.0}, {}, {}, [2, SEARCH + 1, CUT]),
    "separate": (DEFAULT, {}, {"data": {"packing": "separate"}}, [3]),
    "padded": (DEFAULT, {}, {"data": {"packing": "padded"}}, [3]),
}


@pytest.fixture(scope="module", params=CASES)
def finished(request, tmp_path_factory):
    training, decisions, others, steps = CASES[request.param]
    folder = tmp_path_factory.mktemp("run")
    options = {"training": training, "decisions": decisions, **others}
    trainer = make(folder, **options)
    trainer.train()
    return trainer, folder, options, steps


def test_a_run_meets_budget_and_certificate(finished, tmp_path):
    trainer, folder, options, _ = finished
    budget, mask, training = Budget(trainer.space), trainer.decisions.mask, options["training"]
    assert abs(budget.share(mask) - 0.6) < 0.02  # one block of a tiny model is coarse
    certificate = trainer.export(tmp_path)
    assert certificate["removed_lora_norm"] == 0.0 and certificate["merge_error"] <= 1.0
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["cut_vs_reloaded"] < 1e-5
    if training["settle"]:
        assert certificate["frozen_vs_cut"] > 5 * certificate["masked_vs_cut"], "removed groups had learnt something"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    removed = budget.total - budget.kept(mask)
    assert sum(p.numel() for p in reloaded.parameters()) == trainer.params_before - removed
    found, phases = records(folder), ["open", "search", "settle", "tune"]
    assert [r["phase"] for r in found] == [phase for phase in phases for _ in range(training[phase])]
    assert ["keep" in r for r in found] == [r["phase"] in ("search", "settle") for r in found]
    penalty, other = ("l0", "lasso") if "regularizer" in training else ("lasso", "l0")
    assert [penalty in r for r in found] == [r["phase"] in ("search", "settle") for r in found]
    assert not any(other in r for r in found) and all(r[penalty] > 0 for r in found if r.get("keep", 1) < 1)


def test_resume_is_bit_exact_from_every_phase(finished, tmp_path):
    trainer, folder, options, steps = finished
    penalties = [record.get("l0") for record in records(folder)]
    for step in steps:
        again = resumed(folder, step, tmp_path / str(step), **options)
        assert_same_end(again, trainer)
        assert [record.get("l0") for record in records(tmp_path / str(step))] == penalties[step:]


@pytest.mark.parametrize("finished", ["disp"], indirect=True)
def test_all_five_structures_move_and_the_export_holds_their_selections(finished, tmp_path):
    trainer, folder, _, _ = finished
    trainer.export(tmp_path)
    for structure in trainer.space.layer(0):
        assert min(records(folder)[CUT - 1]["kept_by_layer"][structure.name]) < 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for layer, kept in enumerate(trainer.space.kept_indices(trainer.decisions.mask)):
        shape = reloaded.config.layer_shape(layer)
        assert shape.intermediate_size == len(kept.pop("mlp"))
        assert all((getattr(shape, name) or list(range(32))) == positions for name, positions in kept.items())


def test_saliency_is_taken_where_its_source_says(tmp_path):
    """static on the weights as they came, tuned on those that the open phase left."""
    found = {}
    for source in ("static", "tuned"):
        trainer = make(tmp_path / source, training=AT_ONCE | {"tune": 1}, decisions={"source": source})
        steps = []
        take = trainer.pruning.start
        trainer.pruning.start = lambda trainer=trainer, take=take, steps=steps: (steps.append(trainer.step), take())
        trainer.train()
        found[source] = steps, trainer.pruning.decisions.saliency
    assert found["static"][0] == [0] and found["tuned"][0] == [OPEN]
    assert not torch.equal(found["static"][1], found["tuned"][1])


@pytest.mark.parametrize(("space", "size"), [("kv_group", 1), ("head_dim", 3), ("disp", 2)])
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
    seen = []
    running.pruning.decisions.observe = seen.append
    running.train()
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-12)


def test_open_steps_are_those_of_plain_lora(tmp_path):
    """Whatever watches them: weights after them are the same to rounding."""
    ends = {}
    for source in ("tuned", "running"):
        training = AT_ONCE | {"tune": 1}
        make(tmp_path / source, training=training, decisions={"source": source}, lora={"dropout": 0.0}).train()
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
        training = AT_ONCE | {"tune": 1, "batch_size": 1, "gradient_accumulation": 2}
        trainer = make(tmp_path / str(source), training=training, decisions=decisions, lora={"dropout": 0.0})
        trainer.train()
        assert trainer.pruning.decisions.saliency.count_nonzero()
        ends[source] = trainer.decisions.mask
    assert torch.equal(ends[None], ends["running"])


def test_a_step_of_several_batches_is_watched_in_each(tmp_path):
    training = AT_ONCE | {"tune": 1, "gradient_accumulation": 2, "batch_size": 1}
    trainer = make(tmp_path, training=training, decisions={"source": "running"})
    seen = []
    trainer.pruning.decisions.observe = seen.append
    trainer.train()
    assert len(seen) == 2 * OPEN
