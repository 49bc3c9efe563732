"""Relative performance: how much of the tuned dense model's scores another model keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from atp.data.tasks import ROUGE, Task
from atp.errors import InputError
from atp.evaluation.bootstrap import Statistic, percentile_interval, resampled
from atp.evaluation.metrics import confusion_items, macro_f1, perplexity_of, ratio, right_items

Samples = tuple[np.ndarray, np.ndarray]
"""A score [], and the same score on resampled test items [resamples]."""


def relative_performance(
    scores: dict[str, Any], dense: dict[str, Any], tasks: Sequence[Task], seed: int = 0
) -> dict[str, object]:
    """Mean over the tasks' metrics of score / dense score (docs/evaluation.md), both from `evaluate_model`.

    Perplexity, where lower is better, is not part of the mean; its ratio is given separately. Intervals resample
    documents and questions of both models together, which is narrower than two separate intervals.
    A metric that is 0 for the dense model has no ratio and is left out.
    Returns {perplexity_ratio, perplexity_ratio_interval} and, where any metric has a ratio, {relative_performance,
    relative_performance_interval, ratios: {task metric: ratio}}.
    Raises `InputError` if the two were not scored on the same items.
    """
    _check_same_items(scores, dense, tasks)
    ours, theirs = score_samples(scores, tasks, seed), score_samples(dense, tasks, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = {name: tuple(a / b for a, b in zip(ours[name], theirs[name], strict=True)) for name in ours}
    against, draws = kept.pop("perplexity")
    found: dict[str, object] = {
        "perplexity_ratio": float(against),
        "perplexity_ratio_interval": percentile_interval(draws),
    }
    ratios = {name: float(ratio) for name, (ratio, _) in kept.items() if math.isfinite(ratio)}
    samples = [kept[name][1] for name in ratios]
    if ratios:
        means = np.mean(samples, axis=0)
        found |= {
            "relative_performance": float(np.mean(list(ratios.values()))),
            # A resample in which the dense model gets nothing right has no ratio.
            "relative_performance_interval": percentile_interval(means[np.isfinite(means)]),
            "ratios": ratios,
        }
    return found


def score_samples(scores: dict[str, Any], tasks: Sequence[Task], seed: int = 0) -> dict[str, Samples]:
    """For perplexity and every `<task> <metric>`: the score over all items, and resampled scores float64 [resamples].

    scores: from `evaluate_model`. Models scored on the same items are resampled alike, so that their samples can be
    compared pairwise.
    """
    tables: dict[str, tuple[np.ndarray, Statistic]] = {
        "perplexity": (np.asarray(scores["items"], dtype=np.float64), perplexity_of)
    }
    for task in tasks:
        items = scores["tasks"][task.name]["items"]
        for metric in task.metrics:
            tables[f"{task.name} {metric}"] = _items(items, task, metric), _STATISTICS.get(metric, ratio)
    return {
        name: (statistic(items.sum(axis=0)), resampled(items, statistic, seed))
        for name, (items, statistic) in tables.items()
    }


_STATISTICS: dict[str, Statistic] = {"macro_f1": macro_f1}


def _items(items: list[list[Any]], task: Task, metric: str) -> np.ndarray:
    """One row per item, whose sums give the metric."""
    if metric in ROUGE:
        return np.array([[item[ROUGE.index(metric)], 1.0] for item in items])
    truth, predicted = zip(*items, strict=True)
    return confusion_items(truth, predicted, task.labels) if metric == "macro_f1" else right_items(truth, predicted)


def _check_same_items(scores: dict[str, Any], dense: dict[str, Any], tasks: Sequence[Task]) -> None:
    tokens = [[count for _, count in model["items"]] for model in (scores, dense)]
    differing = ["perplexity"] if tokens[0] != tokens[1] else []
    for task in tasks:
        ours, theirs = scores["tasks"][task.name]["items"], dense["tasks"][task.name]["items"]
        truths = [[item[0] for item in items] if task.labels else len(items) for items in (ours, theirs)]
        differing += [task.name] if truths[0] != truths[1] else []
    if differing:
        raise InputError(
            f"{differing[0]}: the two models were not scored on the same items: score both with the same suite and "
            "settings"
        )
