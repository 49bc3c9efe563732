"""The majority label: which it is, and what it scores, by hand."""

import pytest

from atp.data.splits import Example
from atp.data.tasks import ROUGE, Task
from atp.evaluation.majority import majority_scores
from atp.evaluation.tasks import answer_scores

QA = Task("qa", ("no", "yes"))
OTHER = Task("other", ("no", "yes"))
FREE = Task("free", metrics=ROUGE)


def examples(labels, task="qa"):
    return [Example(str(n), "is it ?", f" {label}", label, task) for n, label in enumerate(labels)]


def test_it_is_the_training_splits_and_scores_by_hand():
    train = examples(["yes", "no", "yes"]) + examples(["no"] * 9, "other") + examples([None] * 5)
    found = majority_scores(train, examples(["no", "no", "yes", "no"]), [QA])["qa"]
    assert (found["label"], found["of"], found["n"]) == ("yes", "train", 4)
    assert found["accuracy"] == 1 / 4
    # F1 of yes: 2 of (1 true + 4 given); F1 of no: 0.
    assert found["macro_f1"] == pytest.approx((2 / 5 + 0) / 2)
    assert found["confusion"] == {"no": {"no": 0, "yes": 3}, "yes": {"no": 0, "yes": 1}}
    assert found["items"] == [["no", "yes"], ["no", "yes"], ["yes", "yes"], ["no", "yes"]]


def test_the_test_questions_decide_without_training_labels_and_the_tasks_order_between_equals():
    found = majority_scores(examples([None, None]), examples(["yes", "no", "yes"]), [QA])["qa"]
    assert (found["label"], found["of"], found["accuracy"]) == ("yes", "test", pytest.approx(2 / 3))
    best = max(answer_scores(["yes", "no", "yes"], [label] * 3, QA.labels)["macro_f1"] for label in QA.labels)
    assert found["macro_f1"] == best, "no constant answer beats it"
    for order in (["yes", "no"], ["no", "yes"]):
        assert majority_scores(examples(order), examples(["yes"]), [QA])["qa"]["label"] == "no"


def test_only_the_questions_that_are_scored_and_only_tasks_with_labels():
    test = examples(["yes", "no", "no"]) + examples(["no"], "other") + [Example("9", "Summary:", " x", None, "free")]
    found = majority_scores(examples(["yes"]), test, [QA, OTHER, FREE], max_examples=1)
    assert {name: scores["n"] for name, scores in found.items()} == {"qa": 1, "other": 1}
    assert found["qa"]["accuracy"] == 1
