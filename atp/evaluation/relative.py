"""Relative performance: how much of the tuned dense model's scores another model keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atp.data.tasks import ROUGE, Task
from atp.evaluation.bootstrap import Samples, Statistic, over_seeds, percentile_interval, resampled
from atp.evaluation.metrics import bits_per_byte_of, confusion_items, macro_f1, perplexity_of, ratio, right_items
from atp.ground.errors import InputError


def relative_performance(
    scores: dict[str, Any],
    dense: dict[str, Any],
    tasks: Sequence[Task],
    majority: Mapping[str, dict[str, Any]],
    seed: int = 0,
) -> dict[str, object]:
    """Mean over the tasks' metrics of score / dense score (docs/evaluation.md), both from `evaluate_model`.

    Perplexity, where lower is better, is not part of the mean; its ratio is given separately. Intervals resample
    documents and questions of both models together, which is narrower than two separate intervals.
    A ROUGE score that is 0 for the dense model has no ratio and is left out; a metric that `not_measurable` names has
    the ratio None. majority: the result of `majority_scores`.
    Returns {perplexity_ratio, perplexity_ratio_interval} and, where there is any metric, {relative_performance,
    relative_performance_interval (None where no metric is measurable), ratios: {task metric: ratio}, not_measurable:
    {task metric: why}}.
    Raises `InputError` if the two were not scored on the same items.
    """
    _check_same_items(scores, dense, tasks, majority)
    ours, theirs = score_samples(scores, tasks, seed), score_samples(dense, tasks, seed)
    ours.pop("bits_per_byte", None)  # in proportion to the logarithm of perplexity here, which has a ratio already
    unclear = not_measurable([theirs], majority_samples(majority, tasks, seed))
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = {name: tuple(a / b for a, b in zip(ours[name], theirs[name], strict=True)) for name in ours}
    against, draws = kept.pop("perplexity")
    found: dict[str, object] = {
        "perplexity_ratio": float(against),
        "perplexity_ratio_interval": percentile_interval(draws),
    }
    ratios = {name: float(r) for name, (r, _) in kept.items() if math.isfinite(r) and name not in unclear}
    if not (ratios or unclear):
        return found
    mean, interval = None, None
    if ratios:
        means = np.mean([kept[name][1] for name in ratios], axis=0)
        # A resample in which the dense model gets nothing right has no ratio.
        mean, interval = float(np.mean(list(ratios.values()))), percentile_interval(means[np.isfinite(means)])
    return found | {
        "relative_performance": mean,
        "relative_performance_interval": interval,
        "ratios": ratios | dict.fromkeys(unclear),
        "not_measurable": unclear,
    }


def kept_of_best(
    models: Mapping[str, dict[str, Any]],
    tasks: Sequence[Task],
    majority: Mapping[str, dict[str, Any]],
    seed: int = 0,
) -> dict[str, Any]:
    """What share of the best model's main score each model keeps, and its 95 % interval; higher is better.

    The main score is the mean of the tasks' metrics, without those in which no model clearly beats the majority label;
    where none is left, it is one over the perplexity. models: name -> scores from `evaluate_model` on the same items.
    Both models of a share are resampled together.
    Returns {score: its name, best: the model's name, kept: {name: [share, low, high]}}.
    """
    samples = {name: score_samples(scores, tasks, seed) for name, scores in models.items()}
    floors = majority_samples(majority, tasks, seed)
    measured = [name for name in next(iter(samples.values())) if name not in OF_TEXT]
    for metric, floor in floors.items():
        leader = max(samples.values(), key=lambda own: float(own[metric][0]))
        if not_measurable([leader], {metric: floor}):
            measured.remove(metric)
    with np.errstate(divide="ignore", invalid="ignore"):
        main = {
            name: tuple(np.mean([own[metric][part] for metric in measured], axis=0) for part in (0, 1))
            if measured else tuple(1 / part for part in own["perplexity"])
            for name, own in samples.items()
        }  # fmt: skip
        best = max(main, key=lambda name: float(main[name][0]))
        shares = {name: (point / main[best][0], draws / main[best][1]) for name, (point, draws) in main.items()}
    found = {
        name: [float(share), *percentile_interval(draws[np.isfinite(draws)])] for name, (share, draws) in shares.items()
    }
    return {"score": ", ".join(measured) or "perplexity", "best": best, "kept": found}


def not_measurable(dense: Sequence[Mapping[str, Samples]], majority: Mapping[str, Samples]) -> dict[str, str]:
    """{task metric: why} of the metrics that say nothing about a model beside the tuned dense one.

    A metric counts if the tuned dense model beats the majority label by more than the interval of their difference:
    its lower bound is above 0. Answers that a constant matches show no ability that a smaller model could keep.
    dense: the result of `score_samples` for each seed. majority: of `majority_samples`, on the same questions.
    """
    found = {}
    for name, (floor, draws) in majority.items():
        gain = over_seeds([(own[name][0] - floor, own[name][1] - draws) for own in dense])
        low, high = gain["interval"]
        if not low > 0:
            found[name] = (
                f"the tuned dense model's {floor + gain['value']:.3f} is not clearly above the majority label's "
                f"{floor:.3f} (difference {gain['value']:.3f}, 95 %: {low:.3f} to {high:.3f})"
            )
    return found


def score_samples(scores: dict[str, Any], tasks: Sequence[Task], seed: int = 0) -> dict[str, Samples]:
    """For `OF_TEXT`, where known, and every `<task> <metric>`: the score over all items, resampled scores float64 [n].

    scores: from `evaluate_model`. Models scored on the same items are resampled alike, so that their samples can be
    compared pairwise.
    """
    documents = np.asarray(scores["items"], dtype=np.float64)
    found = {"perplexity": _samples(documents, perplexity_of, seed)}
    if documents.shape[1] > 2:
        found["bits_per_byte"] = _samples(documents, bits_per_byte_of, seed)
    return found | _task_samples(scores["tasks"], tasks, seed)


def majority_samples(
    majority: Mapping[str, dict[str, Any]], tasks: Sequence[Task], seed: int = 0
) -> dict[str, Samples]:
    """`score_samples` of the majority label: every `<task> <metric>` of the tasks with labels."""
    return _task_samples(majority, [task for task in tasks if task.labels], seed)


def _task_samples(scores: Mapping[str, dict[str, Any]], tasks: Sequence[Task], seed: int) -> dict[str, Samples]:
    return {
        f"{task.name} {metric}": _samples(
            _items(scores[task.name]["items"], task, metric), _STATISTICS.get(metric, ratio), seed
        )
        for task in tasks
        for metric in task.metrics
    }


def _samples(items: np.ndarray, statistic: Statistic, seed: int) -> Samples:
    return statistic(items.sum(axis=0)), resampled(items, statistic, seed)


OF_TEXT = ("perplexity", "bits_per_byte")
"""The scores of held-out text, where lower is better; all others are metrics of tasks."""
_STATISTICS: dict[str, Statistic] = {"macro_f1": macro_f1}


def _items(items: list[list[Any]], task: Task, metric: str) -> np.ndarray:
    """One row per item, whose sums give the metric."""
    if metric in ROUGE:
        return np.array([[item[ROUGE.index(metric)], 1.0] for item in items])
    truth, predicted = zip(*items, strict=True)
    return confusion_items(truth, predicted, task.labels) if metric == "macro_f1" else right_items(truth, predicted)


def _check_same_items(
    scores: dict[str, Any], dense: dict[str, Any], tasks: Sequence[Task], majority: Mapping[str, dict[str, Any]]
) -> None:
    tokens = [[item[1] for item in model["items"]] for model in (scores, dense)]
    differing = ["perplexity"] if tokens[0] != tokens[1] else []
    for task in tasks:
        answered = [model["tasks"][task.name]["items"] for model in (scores, dense)]
        answered += [majority[task.name]["items"]] if task.labels else []
        first, *others = [[item[0] for item in items] if task.labels else len(items) for items in answered]
        differing += [task.name] if any(truths != first for truths in others) else []
    if differing:
        raise InputError(
            f"{differing[0]}: the two models were not scored on the same items: score both with the same suite and "
            "settings"
        )
