"""The question that a run shows: chosen as it says, with the answers that were scored."""

import pytest

from atp.data.splits import Example
from atp.data.tasks import ROUGE, Task
from atp.evaluation.answers import answered_question

QA, SECOND = Task("qa", ("yes", "no")), Task("second", ("yes", "no"))
FREE = Task("free", metrics=ROUGE)
TRUTH = ["yes", "no", "no", "yes"]


def questions(task="qa"):
    return [Example(str(n), f"{task} question {n}", "", label, task) for n, label in enumerate(TRUTH)]


def scored(*answers, task="qa"):
    return {"tasks": {task: {"items": [list(pair) for pair in zip(TRUTH, answers, strict=True)]}}}


def test_the_first_that_tuning_taught():
    models = {
        "original": scored("yes", "no", "yes", "no"),
        "tuned_dense": scored("yes", "no", "yes", "yes"),
        "final": scored("no", "no", "no", "yes"),
    }
    shown = answered_question(models, [Example("x", "plain text"), *questions()], [FREE, QA])
    assert (shown["task"], shown["prompt"], shown["truth"]) == ("qa", "qa question 2", "no")
    assert shown["models"] == {"original": "yes", "tuned_dense": "yes", "final": "no"}
    assert shown["chosen"] == (
        "A question that tuning taught: the first of 2 (of 4 test questions of qa) that the original model gets wrong "
        "and the final one right. For 1 it is the other way around."
    )


@pytest.mark.parametrize("final", [("yes", "no", "yes", "no"), ("no", "no", "yes", "no")])
def test_without_such_a_question_the_first_is_shown_and_it_says_so(final):
    """The second model even unlearns one, which must not pass for one that tuning taught."""
    models = {"original": scored("yes", "no", "yes", "no"), "final": scored(*final)}
    shown = answered_question(models, questions(), [QA])
    assert shown["prompt"] == "qa question 0" and shown["models"]["final"] == final[0]
    assert shown["chosen"].startswith("The first test question: there is none")


def test_every_task_is_looked_through():
    """The first task teaches nothing, the second does."""
    models = {
        "original": {"tasks": scored(*TRUTH)["tasks"] | scored("no", *TRUTH[1:], task="second")["tasks"]},
        "final": {"tasks": scored(*TRUTH)["tasks"] | scored(*TRUTH, task="second")["tasks"]},
    }
    test = [example for pair in zip(questions(), questions("second"), strict=True) for example in pair]
    shown = answered_question(models, test, [QA, SECOND])
    assert (shown["task"], shown["prompt"]) == ("second", "second question 0")
    assert answered_question({"original": {"tasks": {}}, "final": {"tasks": {}}}, questions(), [FREE]) is None
