"""The majority label: the score of a constant answer, which a model must beat before its score says anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from atp.data.examples import Example, values
from atp.data.tasks import Task
from atp.evaluation.suite import task_examples
from atp.evaluation.tasks import answer_scores


def majority_scores(
    train: Sequence[Example],
    test: Sequence[Example],
    tasks: Sequence[Task],
    *,
    max_examples: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """For each task with labels, the scores of always giving the most frequent label of the training examples.

    Scored on the test questions that `evaluate_model` takes, with the same bootstrap samples, so that models can be
    compared with it pair by pair. Without training labels the most frequent label of those questions stands in, which
    no constant answer beats.
    Returns {task: {label, of: "train" or "test", and the result of `answer_scores`}}.
    """
    found = {}
    for task in tasks:
        questions = task_examples(test, task)[:max_examples]
        if not task.labels or not questions:
            continue
        known = zip(values(train, "task"), values(train, "label"), strict=True)
        learnt = [str(label) for name, label in known if name == task.name and label in task.labels]
        truth = [str(example.label) for example in questions]
        counts = Counter(learnt or truth)
        label = max(task.labels, key=counts.__getitem__)  # the first of equals, whatever the order of examples
        scores = answer_scores(truth, [label] * len(truth), task.labels, seed)
        found[task.name] = {"label": label, "of": "train" if learnt else "test", **scores}
    return found
