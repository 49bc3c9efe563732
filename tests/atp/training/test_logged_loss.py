"""The loss of a record is the mean over all scored tokens of its steps, in however many batches they were read."""

import pytest
import torch
from tiny_run import CUT, TOTAL, make, ragged, records, windows
from torch.nn import functional as F

from atp.baselines.tuner import LoraTuner
from atp.data import RaggedDataset

pytestmark = pytest.mark.slow

# One step of four samples: (batch_size, gradient_accumulation).
SHAPES = [(4, 1), (2, 2), (1, 4)]


def uneven(count, seed):
    """Documents of different lengths, with different numbers of scored tokens."""
    rows = [row["input_ids"].tolist() for row in ragged(count, seed)]
    return RaggedDataset([(ids, [-100] * (len(ids) - 1 - n % 3) + ids[-1 - n % 3 :]) for n, ids in enumerate(rows)])


def atp(folder, **training):
    return make(folder, training={"batch_size": 4, "lr": 1e-4} | training, lora={"dropout": 0.0})


def tuner(folder, **training):
    made = atp(folder, **training)
    return LoraTuner(made.config, made.model, windows(20, 1), folder)


@pytest.mark.parametrize("build", [atp, tuner])
def test_loss_and_lasso_do_not_depend_on_accumulation(tmp_path, build):
    """The same four samples a step, in one batch, two or four."""
    found = []
    for size, batches in SHAPES:
        folder = tmp_path / str(batches)
        build(folder, batch_size=size, gradient_accumulation=batches).train()
        found.append([(r["loss"], r.get("lasso", 0.0)) for r in records(folder)])
    assert len(found[0]) == TOTAL
    assert any(lasso > 0 for _, lasso in found[0]) == (build is atp)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=0)


def sums_by_step(trainer):
    """Watches a trainer: for each step after the cut the cross-entropy of plain torch, [sum, tokens]."""
    seen = {}
    original = trainer.loss

    def watched(inputs, count):
        model, step = trainer.model, trainer.step
        if step >= CUT or isinstance(trainer, LoraTuner):
            with torch.no_grad():
                model.eval()
                logits = model(input_ids=inputs["input_ids"], position_ids=inputs.get("position_ids")).logits
                model.train()
            labels = inputs["labels"][:, 1:]
            total = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="sum")
            before = seen.get(step, (0.0, 0))
            seen[step] = before[0] + float(total), before[1] + int((labels != -100).sum())
        return original(inputs, count)

    trainer.loss = watched
    return seen


@pytest.mark.parametrize("build", [atp, tuner])
@pytest.mark.parametrize("data", [windows, uneven])
def test_loss_is_the_mean_over_the_tokens_of_the_step(tmp_path, build, data):
    """Batches of a step have different numbers of tokens where documents are padded."""
    trainer = build(tmp_path, batch_size=1, gradient_accumulation=3)
    trainer.train_dataset = data(20, 1)
    seen = sums_by_step(trainer)
    trainer.train()
    logged = {record["step"] - 1: record["loss"] for record in records(tmp_path)}
    assert len(seen) >= TOTAL - CUT
    for step, (total, tokens) in seen.items():
        assert logged[step] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("build", [atp, tuner])
def test_loss_is_the_mean_of_the_steps_since_the_last_record(tmp_path, build):
    build(tmp_path / "each", gradient_accumulation=2).train()
    build(tmp_path / "third", gradient_accumulation=2, log_every=3).train()
    each = [record["loss"] for record in records(tmp_path / "each")]
    for record in records(tmp_path / "third"):
        assert record["step"] % 3 == 0
        # A record that follows the cut covers the steps after it.
        first = max(record["step"] - 3, CUT if build is atp and record["step"] > CUT else 0)
        expected = each[first : record["step"]]
        assert record["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
