"""What stands beside each other in the tables of a run: its models, the recorded dense model, the majority label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODELS = {"original": "original", "tuned_dense": "tuned dense", "final": "cut and tuned"}
OTHERS = {"recorded_dense": "tuned dense (recorded)", "majority": "majority label"}
NOT_MEASURABLE = "not measurable"


def columns(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: {perplexity, perplexity_interval, tasks: {task: scores}}} in the order of a table, from summary.json.

    name: a key of `MODELS` or `OTHERS`. The majority label has no perplexity.
    """
    tasks, bounds = summary.get("tasks") or (), summary.get("perplexity_interval") or {}
    found = {
        name: {
            "perplexity": summary["perplexity"][name],
            "perplexity_interval": bounds.get(name),
            "tasks": {task: summary[task].get(name, {}) for task in tasks},
        }
        for name in MODELS
        if name in summary.get("perplexity", {})
    }
    if summary.get("recorded_dense"):
        found["recorded_dense"] = summary["recorded_dense"]
    if summary.get("majority"):
        found["majority"] = {"tasks": summary["majority"]}
    return found


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of these columns must know, one sentence each."""
    found = [
        f"Majority label of {task}: always {scores['label']!r}, the most frequent answer of the "
        f"{'training' if scores['of'] == 'train' else 'test'} questions."
        for task, scores in (summary.get("majority") or {}).items()
    ]
    if summary.get("recorded_dense"):
        command = summary["recorded_dense"]["command"]
        found.append(f"Tuned dense (recorded): not part of this run, but what `{command}` gave earlier.")
    return found + unclear(summary.get("not_measurable") or {})


def unclear(why: Mapping[str, str]) -> list[str]:
    """One sentence for each metric on which relative performance says nothing. why: `not_measurable` of a summary."""
    return [f"Relative performance in {name} is {NOT_MEASURABLE}: {reason}." for name, reason in why.items()]


def answers(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(who, what) of a run's shown question: the prompt, the true answer, and that of each model; [] without one."""
    shown = summary.get("answers")
    if not shown or "answers" in summary["tasks"]:  # the user's free-text task has that name, and no such question
        return []
    given = [(MODELS.get(name, name), str(answer)) for name, answer in shown["models"].items()]
    return [("question", str(shown["prompt"])), ("true answer", str(shown["truth"])), *given]
