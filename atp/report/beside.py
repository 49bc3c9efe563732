"""What stands beside each other in the tables of a run: its models, the recorded dense model, the majority label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atp.evaluation.relative import OF_TEXT
from atp.report.text import number
from atp.vocabulary.vocabulary import words_remark

MODELS = {"original": "original", "tuned_dense": "tuned dense", "final": "cut and tuned"}
OTHERS = {"recorded_dense": "tuned dense (recorded)", "majority": "majority label"}
NOT_MEASURABLE = "not measurable"
METRICS = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"
}  # fmt: skip

_PARTS = {"words": ("embedding", "head"), "attention": ("attention",), "mlp": ("mlp",)}


def columns(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: {score of `OF_TEXT`, its interval, tasks: {task: scores}}} in the order of a table, from summary.json.

    name: a key of `MODELS` or `OTHERS`. The majority label has no score of text.
    """
    tasks = summary.get("tasks") or ()
    keys = [key for score in OF_TEXT for key in (score, f"{score}_interval")]
    found = {
        name: {
            **{key: (summary.get(key) or {}).get(name) for key in keys},
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


def main_metric(summary: Mapping[str, Any], task: str) -> str:
    """The metric that stands for a task."""
    return "macro_f1" if any("macro_f1" in scored for scored in summary[task].values()) else "rougeL"


def effects(summary: Mapping[str, Any]) -> list[str]:
    """What tuning alone does to each main score, and what the cut does beside it; or how to find out.

    Empty for a method that ATP is compared with, whose dense model is another run of the comparison, and for the scores
    of one model.
    """
    perplexity = summary.get("perplexity")
    if "method" in summary or not isinstance(perplexity, Mapping) or not {"original", "final"} <= perplexity.keys():
        return []
    dense = "tuned_dense" if "tuned_dense" in perplexity else "recorded_dense"
    shown = columns(summary)
    if dense not in shown:
        return [
            "What tuning alone does is not measured, so neither is what the cut costs: evaluation.dense_baseline=true "
            "also tunes the whole model."
        ]
    three = [shown[name] for name in ("original", dense, "final")]
    scores = [
        (f"{task} {METRICS[metric]}", [each["tasks"].get(task, {}).get(metric) for each in three], 3)
        for task in summary.get("tasks") or ()
        for metric in [main_metric(summary, task)]
    ]
    key, label, digits = compared_text(summary)
    scores.append((label, [each.get(key) for each in three], digits))
    return [
        "{}: tuning alone takes the whole model from {} to {}, tuning and cutting to {}.".format(
            name[0].upper() + name[1:], *(number(value, digits) for value in values)
        )
        for name, values, digits in scores
        if None not in values
    ]


def perplexity_of(scores: Mapping[str, Any]) -> dict[str, Any]:
    """What a perplexity counts, from the scores of a model, for a summary; empty for scores that do not say."""
    return {key: scores[key] for key in ("counted", "tokens", "length", "stride") if "counted" in scores}


def bits_per_byte(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Bits per byte of models with their intervals, for a summary; empty for scores that know no bytes."""
    keys = ("bits_per_byte", "bits_per_byte_interval")
    known = all(keys[0] in scores for scores in models.values())
    return {key: {name: scores[key] for name, scores in models.items()} for key in keys} if known else {}


def scores_of_text(summary: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(key, label, digits) of each score of held-out text that a run has."""
    found = [("perplexity", perplexity_label(summary), 2)]
    return found + ([("bits_per_byte", "bits per byte", 3)] if summary.get("bits_per_byte") else [])


def compared_text(summary: Mapping[str, Any]) -> tuple[str, str, int]:
    """(key, label, digits) of the score of held-out text by which the models of a run compare.

    Perplexity is per token, so it compares no models with other vocabularies.
    """
    first, *more = scores_of_text(summary)
    return more[0] if more and summary.get("vocabulary") else first


def perplexity_label(summary: Mapping[str, Any]) -> str:
    """What stands before the perplexities of a run."""
    counted = (summary.get("perplexity_of") or {}).get("counted")
    return "held-out perplexity" + (f", {counted}" if counted else "")


def parameters(summary: Mapping[str, Any], name: str) -> Any:
    """Parameters of a model; the tuned dense one has the original's, without words that the run took out."""
    if name == "final":
        return summary.get("params_after")
    before = summary.get("params_before")
    return None if before is None or name == "majority" else before - _of_words(summary, name, "parameters")


def parameters_in(summary: Mapping[str, Any], name: str, part: str) -> int | None:
    """Parameters of a model in one part of it: words (embedding and head), attention or mlp."""
    found = (summary.get("parts") or {}).get(name)
    return None if found is None else sum(found[own] for own in _PARTS[part])


def megabytes(summary: Mapping[str, Any], name: str) -> Any:
    """Megabytes of a model; the tuned dense one has the original's size, without words that the run took out."""
    sizes = summary.get("megabytes") or {}
    if name not in ("tuned_dense", "recorded_dense"):
        return sizes.get(name)
    return sizes["original"] - _of_words(summary, name, "megabytes") if "original" in sizes else None


def _of_words(summary: Mapping[str, Any], name: str, unit: str) -> Any:
    """What the words take that are not in the dense model that a run tunes."""
    found = (summary.get("vocabulary") or {}).get(unit) if name == "tuned_dense" else None
    return found["before"] - found["after"] if found else 0


def counted(protocol: Mapping[str, Any] | None) -> list[str]:
    """A sentence on what a perplexity counts; none where that is not known. protocol: `perplexity_of` of scores."""
    if not protocol or "counted" not in protocol:
        return []
    length, stride = protocol["length"], protocol["stride"]
    apart = "" if stride == length else f" that start {stride} apart"
    return [f"Perplexity counts {protocol['counted']}: {protocol['tokens']:,} tokens in windows of {length}{apart}."]


def result_remarks(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of these columns must know, one sentence each."""
    found = counted(summary.get("perplexity_of")) + effects(summary) + on_words(summary)
    found += [
        f"Majority label of {task}: always {scores['label']!r}, the most frequent answer of the "
        f"{'training' if scores['of'] == 'train' else 'test'} questions."
        for task, scores in (summary.get("majority") or {}).items()
    ]
    if summary.get("recorded_dense"):
        command = summary["recorded_dense"]["command"]
        found.append(f"Tuned dense (recorded): not part of this run, but what `{command}` gave earlier.")
    return found + unclear(summary.get("not_measurable") or {})


def on_words(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know of a run that kept a part of the vocabulary, one sentence each; none of others."""
    if not summary.get("vocabulary"):
        return []
    line = words_remark(summary["vocabulary"])
    return [
        f"{line[0].upper()}{line[1:]}.",
        "Perplexity is per token, and the original model has other tokens: bits per byte compares them.",
    ]


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
