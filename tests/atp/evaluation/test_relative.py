"""Relative performance and the majority label against values worked out by hand."""

import numpy as np
import pytest

from atp.data.splits import Example
from atp.data.tasks import ROUGE, Task
from atp.evaluation import relative_performance
from atp.evaluation.bootstrap import percentile_interval
from atp.evaluation.majority import majority_scores
from atp.evaluation.tasks import answer_scores
from atp.ground.errors import InputError

QA = Task("qa", ("yes", "no"), ("accuracy",))
F1 = Task("f1", ("yes", "no"))
FREE = Task("free", metrics=ROUGE)


def scores(documents, **tasks):
    return {"items": documents, "tasks": {name: {"items": items} for name, items in tasks.items()}}


def answers(*right):
    return [["yes", "yes" if hit else "no"] for hit in right]


def majority(truths, label="no", task="qa"):
    """The constant answer to these questions: always wrong in `answers`, unless the label is yes."""
    return {task: {"items": [[truth, label] for truth in truths]}}


def test_mean_of_ratios_by_hand():
    dense = scores([[2.0, 4], [4.0, 4]], qa=answers(1, 1, 1, 0), free=[[0.4, 0.2, 0.4, "a"], [0.6, 0.2, 0.4, "b"]])
    pruned = scores([[4.0, 4], [4.0, 4]], qa=answers(1, 1, 0, 0), free=[[0.5, 0.1, 0.4, "c"], [0.3, 0.1, 0.4, "d"]])
    found = relative_performance(pruned, dense, [QA, FREE], majority(["yes"] * 4))
    ratios = {"qa accuracy": 2 / 3, "free rouge1": 0.8, "free rouge2": 0.5, "free rougeL": 1.0}
    assert found["ratios"] == pytest.approx(ratios)
    assert found["relative_performance"] == pytest.approx((2 / 3 + 0.8 + 0.5 + 1.0) / 4)
    # Perplexity stands apart: exp(8/8) over exp(6/8).
    assert found["perplexity_ratio"] == pytest.approx(np.exp(0.25))


def test_a_model_against_itself_is_one_without_spread_and_macro_f1_is_the_default_metric():
    truth = ["yes", "no"] * 20
    same = scores([[float(n), n] for n in range(1, 31)], f1=[[t, t] for t in truth])
    wrong = majority(truth, task="f1")
    found = relative_performance(same, same, [F1], wrong)
    assert found["relative_performance"] == 1 and found["relative_performance_interval"] == [1, 1]
    assert found["perplexity_ratio_interval"] == [1, 1]
    # F1 of yes 40/60, of no 0, against 1 and 1.
    found = relative_performance(same | scores(same["items"], f1=[[t, "yes"] for t in truth]), same, [F1], wrong)
    assert found["relative_performance"] == pytest.approx(1 / 3)


def test_shared_items_narrow_the_interval():
    rng = np.random.default_rng(1)
    dense = (rng.random(300) < 0.6).astype(int)
    pruned = dense * (rng.random(300) < 0.9)
    models = (scores([[1.0, 1]], qa=answers(*hits)) for hits in (pruned, dense))
    found = relative_performance(*models, [QA], majority(["yes"] * 300))
    low, high = found["relative_performance_interval"]
    assert low < found["relative_performance"] < high
    apart = [rng.choice(pruned, 300).mean() / rng.choice(dense, 300).mean() for _ in range(500)]
    unpaired = percentile_interval(np.array(apart))
    assert high - low < 0.6 * (unpaired[1] - unpaired[0])


def test_metric_that_the_dense_model_misses_is_left_out():
    dense = scores([[1.0, 1]], qa=answers(0, 0), free=[[0.5, 0.0, 0.5, "a"]])
    wrong = majority(["yes"] * 2)
    found = relative_performance(dense, dense, [QA, FREE], wrong)
    assert found["ratios"] == {"free rouge1": 1, "free rougeL": 1, "qa accuracy": None}
    assert found["relative_performance"] == 1 and found["not_measurable"].keys() == {"qa accuracy"}
    found = relative_performance(dense, dense, [QA], wrong)
    assert found["relative_performance"] is None and found["relative_performance_interval"] is None
    assert "relative_performance" not in relative_performance(dense, dense, [], {})


def test_a_tuned_model_that_gives_one_answer_measures_nothing():
    """The case of old tables: every model answers with the majority label, and all of them keep 1.000 of it."""
    truth = ["yes"] * 28 + ["no"] * 22
    same = scores([[1.0, 1]], f1=[[t, "yes"] for t in truth], free=[[0.4, 0.4, 0.4, "a"]])
    found = relative_performance(same, same, [F1], majority(truth, "yes", "f1"))
    assert found["ratios"] == {"f1 macro_f1": None} and found["relative_performance"] is None
    f1 = 2 * 28 / (28 + 50) / 2
    assert found["not_measurable"] == {
        "f1 macro_f1": f"the tuned dense model's {f1:.3f} is not clearly above the majority label's {f1:.3f} "
        "(difference 0.000, 95 %: 0.000 to 0.000)"
    }
    found = relative_performance(same, same, [F1, FREE], majority(truth, "yes", "f1"))
    assert found["relative_performance"] == 1 and list(found["not_measurable"]) == ["f1 macro_f1"]


@pytest.mark.parametrize(("gained", "measurable"), [(2, False), (12, True)])
def test_the_difference_is_judged_question_by_question(gained, measurable):
    """Dense gets right what the label gets right, and 2 or 12 more of 200: a lead of 0.06 within both intervals.

    Its standard error is sqrt(p (1 - p) / 200) for p = 12/200, thus 0.017, not the 0.048 of two independent scores; for
    p = 2/200 the lead is 1.4 standard errors.
    """
    truth = ["yes"] * 120 + ["no"] * 80
    right = 120 + gained
    dense = scores([[1.0, 1]], qa=[[t, t if n < right else "yes"] for n, t in enumerate(truth)])
    found = relative_performance(dense, dense, [QA], majority(truth, "yes"))
    assert found["relative_performance"] == (1 if measurable else None)
    assert bool(found["not_measurable"]) != measurable


ONE = scores([[1.0, 1]], qa=answers(1))


@pytest.mark.parametrize(
    ("differs", "other", "wrong"),
    [
        ("perplexity", scores([[1.0, 2]], qa=answers(1)), majority(["yes"])),
        ("perplexity", scores([[1.0, 1], [1.0, 1]], qa=answers(1)), majority(["yes"])),
        ("qa", scores([[1.0, 1]], qa=answers(1, 1)), majority(["yes"])),
        ("qa", scores([[1.0, 1]], qa=[["no", "no"]]), majority(["yes"])),
        ("qa", ONE, majority(["yes", "yes"])),
        ("qa", ONE, majority(["no"])),
    ],
)
def test_scores_of_other_items_are_refused(differs, other, wrong):
    with pytest.raises(InputError, match=f"^{differs}: the two models were not scored on the same items"):
        relative_performance(ONE, other, [QA], wrong)


LABELLED = Task("qa", ("no", "yes"))
OTHER = Task("other", ("no", "yes"))


def examples(labels, task="qa"):
    return [Example(str(n), "is it ?", f" {label}", label, task) for n, label in enumerate(labels)]


def test_it_is_the_training_splits_and_scores_by_hand():
    train = examples(["yes", "no", "yes"]) + examples(["no"] * 9, "other") + examples([None] * 5)
    found = majority_scores(train, examples(["no", "no", "yes", "no"]), [LABELLED])["qa"]
    assert (found["label"], found["of"], found["n"]) == ("yes", "train", 4)
    assert found["accuracy"] == 1 / 4
    # F1 of yes: 2 of (1 true + 4 given); F1 of no: 0.
    assert found["macro_f1"] == pytest.approx((2 / 5 + 0) / 2)
    assert found["confusion"] == {"no": {"no": 0, "yes": 3}, "yes": {"no": 0, "yes": 1}}
    assert found["items"] == [["no", "yes"], ["no", "yes"], ["yes", "yes"], ["no", "yes"]]


def test_the_test_questions_decide_without_training_labels_and_the_tasks_order_between_equals():
    found = majority_scores(examples([None, None]), examples(["yes", "no", "yes"]), [LABELLED])["qa"]
    assert (found["label"], found["of"], found["accuracy"]) == ("yes", "test", pytest.approx(2 / 3))
    best = max(answer_scores(["yes", "no", "yes"], [label] * 3, LABELLED.labels)["macro_f1"] for label in ("no", "yes"))
    assert found["macro_f1"] == best, "no constant answer beats it"
    for order in (["yes", "no"], ["no", "yes"]):
        assert majority_scores(examples(order), examples(["yes"]), [LABELLED])["qa"]["label"] == "no"


def test_only_the_questions_that_are_scored_and_only_tasks_with_labels():
    test = examples(["yes", "no", "no"]) + examples(["no"], "other") + [Example("9", "Summary:", " x", None, "free")]
    found = majority_scores(examples(["yes"]), test, [LABELLED, OTHER, FREE], max_examples=1)
    assert {name: scores["n"] for name, scores in found.items()} == {"qa": 1, "other": 1}
    assert found["qa"]["accuracy"] == 1
