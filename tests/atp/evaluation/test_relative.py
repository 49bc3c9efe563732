"""Relative performance against the mean of ratios worked out by hand."""

import numpy as np
import pytest

from atp.data.tasks import ROUGE, Task
from atp.errors import InputError
from atp.evaluation import relative_performance
from atp.evaluation.bootstrap import percentile_interval

QA = Task("qa", ("yes", "no"), ("accuracy",))
F1 = Task("f1", ("yes", "no"))
FREE = Task("free", metrics=ROUGE)


def scores(documents, **tasks):
    return {"items": documents, "tasks": {name: {"items": items} for name, items in tasks.items()}}


def answers(*right):
    return [["yes", "yes" if hit else "no"] for hit in right]


def test_mean_of_ratios_by_hand():
    dense = scores([[2.0, 4], [4.0, 4]], qa=answers(1, 1, 1, 0), free=[[0.4, 0.2, 0.4, "a"], [0.6, 0.2, 0.4, "b"]])
    pruned = scores([[4.0, 4], [4.0, 4]], qa=answers(1, 1, 0, 0), free=[[0.5, 0.1, 0.4, "c"], [0.3, 0.1, 0.4, "d"]])
    found = relative_performance(pruned, dense, [QA, FREE])
    assert found["ratios"] == pytest.approx(
        {"qa accuracy": 2 / 3, "free rouge1": 0.8, "free rouge2": 0.5, "free rougeL": 1.0}
    )
    assert found["relative_performance"] == pytest.approx((2 / 3 + 0.8 + 0.5 + 1.0) / 4)
    # Perplexity stands apart: exp(8/8) over exp(6/8).
    assert found["perplexity_ratio"] == pytest.approx(np.exp(0.25))


def test_macro_f1_is_the_default_metric():
    truth = ["yes", "yes", "no", "no"]
    dense = scores([[1.0, 1]], f1=[[t, t] for t in truth])
    pruned = scores([[1.0, 1]], f1=[[t, "yes"] for t in truth])
    # F1 of yes 4/6, of no 0, against 1 and 1.
    assert relative_performance(pruned, dense, [F1])["relative_performance"] == pytest.approx(1 / 3)


def test_a_model_against_itself_is_one_without_spread():
    same = scores([[float(n), n] for n in range(1, 31)], qa=answers(*[1, 0] * 20))
    found = relative_performance(same, same, [QA])
    assert found["relative_performance"] == 1 and found["relative_performance_interval"] == [1, 1]
    assert found["perplexity_ratio_interval"] == [1, 1]


def test_shared_items_narrow_the_interval():
    rng = np.random.default_rng(1)
    dense = (rng.random(300) < 0.6).astype(int)
    pruned = dense * (rng.random(300) < 0.9)
    found = relative_performance(scores([[1.0, 1]], qa=answers(*pruned)), scores([[1.0, 1]], qa=answers(*dense)), [QA])
    low, high = found["relative_performance_interval"]
    assert low < found["relative_performance"] < high
    apart = [rng.choice(pruned, 300).mean() / rng.choice(dense, 300).mean() for _ in range(500)]
    unpaired = percentile_interval(np.array(apart))
    assert high - low < 0.6 * (unpaired[1] - unpaired[0])


def test_metric_that_the_dense_model_misses_is_left_out():
    dense = scores([[1.0, 1]], qa=answers(0, 0), free=[[0.5, 0.0, 0.5, "a"]])
    found = relative_performance(dense, dense, [QA, FREE])
    assert found["ratios"] == {"free rouge1": 1, "free rougeL": 1}
    assert "relative_performance" not in relative_performance(dense, dense, [QA])
    assert "relative_performance" not in relative_performance(dense, dense, [])


@pytest.mark.parametrize(
    "other",
    [
        scores([[1.0, 2]], qa=answers(1)),
        scores([[1.0, 1], [1.0, 1]], qa=answers(1)),
        scores([[1.0, 1]], qa=answers(1, 1)),
        scores([[1.0, 1]], qa=[["no", "no"]]),
    ],
)
def test_other_items_are_refused(other):
    with pytest.raises(InputError, match="not scored on the same items"):
        relative_performance(scores([[1.0, 1]], qa=answers(1)), other, [QA])
