"""One question of the test split with the answers that the scored models gave to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atp.data.splits import Example
from atp.data.tasks import Task
from atp.evaluation.suite import task_examples

BEFORE, AFTER = "original", "final"


def answered_question(
    scores: Mapping[str, dict[str, Any]], test: Sequence[Example], tasks: Sequence[Task]
) -> dict[str, Any] | None:
    """The first test question that the original model gets wrong and the final one right, else the first of all.

    scores: {model: the result of `evaluate_model`}, "original" and "final" among them. Nothing is run: the answers are
    those that were scored.
    Returns {task, prompt, truth, models: {model: answer}, chosen: how, in words}; None if no task has labels.
    """
    labelled = [task for task in tasks if task.labels]
    for task in labelled:
        before, after = (scores[model]["tasks"][task.name]["items"] for model in (BEFORE, AFTER))
        taught, lost = _changes(before, after), _changes(after, before)
        if taught:
            chosen = (
                f"A question that tuning taught: the first of {len(taught)} (of {len(after)} test questions of "
                f"{task.name}) that the original model gets wrong and the final one right. For {len(lost)} it is the "
                "other way around."
            )
            return _shown(scores, test, task, taught[0], chosen)
    if not labelled:
        return None
    chosen = "The first test question: there is none that the original model gets wrong and the final one right."
    return _shown(scores, test, labelled[0], 0, chosen)


def _changes(wrong: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> list[int]:
    """Positions of the questions that the first model gets wrong and the second one right."""
    pairs = zip(wrong, right, strict=True)
    return [at for at, ((truth, one), (_, other)) in enumerate(pairs) if one != truth == other]


def _shown(
    scores: Mapping[str, dict[str, Any]], test: Sequence[Example], task: Task, position: int, chosen: str
) -> dict[str, Any]:
    example = task_examples(test, task)[position]
    items = {model: found["tasks"][task.name]["items"][position] for model, found in scores.items()}
    return {
        "task": task.name,
        "prompt": example.prompt,
        "truth": example.label,
        "models": {model: answer for model, (_, answer) in items.items()},
        "chosen": chosen,
    }
