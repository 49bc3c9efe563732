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


def relative_performance(
    scores: dict[str, Any], dense: dict[str, Any], tasks: Sequence[Task], seed: int = 0
) -> dict[str, object]:
    """Mean over the tasks' metrics of score / dense score (1-method.md section 6), both from `evaluate_model`.

    Perplexity, where less is better, is no part of the mean and stands beside it as a plain ratio. Intervals resample
    documents and questions for both models at once, which is narrower than two intervals apart.
    A metric that is 0 for the dense model has no ratio and is left out.
    Returns {perplexity_ratio, perplexity_ratio_interval} and, where any metric has a ratio, {relative_performance,
    relative_performance_interval, ratios: {task metric: ratio}}.
    Raises `InputError` when the two were not scored on the same items.
    """
    documents = (np.asarray(model["items"], dtype=np.float64) for model in (scores, dense))
    against, draws = _ratio(*documents, perplexity_of, "perplexity", seed)
    found: dict[str, object] = {"perplexity_ratio": against, "perplexity_ratio_interval": percentile_interval(draws)}
    ratios: dict[str, float] = {}
    samples = []
    for task in tasks:
        ours, theirs = scores["tasks"][task.name]["items"], dense["tasks"][task.name]["items"]
        if task.labels and [truth for truth, _ in ours] != [truth for truth, _ in theirs]:
            raise InputError(_mismatch(task.name))
        for metric in task.metrics:
            name = f"{task.name} {metric}"
            kept, drawn = _ratio(
                _items(ours, task, metric), _items(theirs, task, metric), _STATISTICS.get(metric, ratio), name, seed
            )
            if math.isfinite(kept):
                ratios[name] = kept
                samples.append(drawn)
    if ratios:
        means = np.mean(samples, axis=0)
        found |= {
            "relative_performance": float(np.mean(list(ratios.values()))),
            # A resample in which the dense model has nothing right says nothing about the ratio.
            "relative_performance_interval": percentile_interval(means[np.isfinite(means)]),
            "ratios": ratios,
        }
    return found


_STATISTICS: dict[str, Statistic] = {"macro_f1": macro_f1}


def _items(items: list[list[Any]], task: Task, metric: str) -> np.ndarray:
    """One row an item, whose sums give the metric."""
    if metric in ROUGE:
        return np.array([[item[ROUGE.index(metric)], 1.0] for item in items])
    truth, predicted = zip(*items, strict=True)
    return confusion_items(truth, predicted, task.labels) if metric == "macro_f1" else right_items(truth, predicted)


def _ratio(
    ours: np.ndarray, theirs: np.ndarray, statistic: Statistic, name: str, seed: int
) -> tuple[float, np.ndarray]:
    """Ratio of the two scores over all items, and over resampled ones."""
    if ours.shape != theirs.shape or (name == "perplexity" and (ours[:, 1] != theirs[:, 1]).any()):
        raise InputError(_mismatch(name))
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = statistic(ours.sum(axis=0)) / statistic(theirs.sum(axis=0))
        return float(whole), resampled(ours, statistic, seed) / resampled(theirs, statistic, seed)


def _mismatch(name: str) -> str:
    return f"{name}: the two models were not scored on the same items: score both with the same suite and settings"
