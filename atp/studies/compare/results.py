"""The summary of a comparison: means over seeds, with intervals over seeds and test items."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atp.data import Task
from atp.evaluation.bootstrap import Samples, over_seeds
from atp.evaluation.relative import OF_TEXT, majority_samples, not_measurable, score_samples

DENSE, ORIGINAL = "dense_lora", "original"


@dataclass(frozen=True)
class Member:
    """One finished run: its summary.json and evaluation.json."""

    method: str
    seed: int
    summary: dict[str, Any]
    scores: dict[str, Any]


def results(members: Sequence[Member], tasks: Sequence[Task], majority: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of the table for the original model and every method; members come grouped by method.

    relative_performance is the mean over the tasks' measurable metrics of score / tuned dense score, None without any;
    perplexity_ratio is perplexity / tuned dense perplexity (below 1 is better). Both compare with the dense member of
    the same seed on the same resampled items, and are left out without one. A rival has no shares, and no perplexity
    ratio. majority: the result of `majority_scores`.
    """
    if not members:
        return {}
    ours = [member for member in members if "rival" not in member.summary]
    dense = _dense_samples(members, tasks)
    unclear = unmeasurable(members, tasks, majority)
    found: dict[str, Any] = {}
    if ours:
        original, summary = score_samples(ours[0].scores["original"], tasks), ours[0].summary
        sizes = {"params": summary["params_before"], "megabytes": summary["megabytes"]["original"]}
        figures = _figures({seed: original for seed in dense} or {0: original}, dense, unclear)
        found[ORIGINAL] = {"keep_decoder": 1.0, "keep_total": 1.0, **sizes, **figures}
    for method in dict.fromkeys(m.method for m in members):
        own = [m for m in members if m.method == method]
        samples = {m.seed: score_samples(m.scores["final"], tasks) for m in own}
        found[method] = {"seeds": list(samples)} | _size_and_cost(own) | _figures(samples, dense, unclear)
        if "rival" in own[0].summary:
            found[method] |= {"keep_decoder": None, "keep_total": None, "rival": own[0].summary["rival"]}
            found[method].pop("perplexity_ratio", None)  # of other tokens
            if ours and _texts(own[0]) != _texts(ours[0]):
                found[method]["rival"]["other_text"] = True
    return found


def unmeasurable(
    members: Sequence[Member], tasks: Sequence[Task], majority: Mapping[str, dict[str, Any]]
) -> dict[str, str]:
    """The result of `not_measurable` over the seeds of the tuned dense model; empty without one."""
    dense = _dense_samples(members, tasks)
    return not_measurable(list(dense.values()), majority_samples(majority, tasks)) if dense else {}


def _dense_samples(members: Sequence[Member], tasks: Sequence[Task]) -> dict[int, dict[str, Samples]]:
    """The scores of the tuned dense model by seed."""
    return {m.seed: score_samples(m.scores["final"], tasks) for m in members if m.method == DENSE}


def trained_seconds(summary: Mapping[str, Any]) -> float:
    """Seconds of training in a run, with choosing, cutting and refitting."""
    return float(sum(value for phase, value in summary["seconds"].items() if phase != "total"))


def _texts(member: Member) -> dict[str, str]:
    """Fingerprints of the splits that a member read."""
    return {name: found for name, found in member.summary["data"].items() if name != "description"}


def _size_and_cost(members: Sequence[Member]) -> dict[str, Any]:
    """Parameters kept and training cost, means over the members."""

    def mean(key: str) -> float:
        return statistics.fmean(m.summary[key] for m in members)

    seconds = statistics.fmean(trained_seconds(m.summary) for m in members)
    return {
        "keep_decoder": mean("keep_decoder"),
        "keep_total": mean("keep_total"),
        "params": round(mean("params_after")),
        "megabytes": statistics.fmean(m.summary["megabytes"]["final"] for m in members),
        "train_tokens": round(mean("train_tokens")),
        "train_seconds": seconds,
        "train_tokens_per_second": mean("train_tokens") / seconds,
    }


def _figures(
    samples: dict[int, dict[str, Samples]], dense: dict[int, dict[str, Samples]], unclear: Collection[str]
) -> dict[str, Any]:
    """Scores over all seeds, and relative figures over the seeds that have a dense member.

    unclear: the metrics that are not measurable.
    """
    first, *others = samples.values()
    names = [name for name in first if all(name in other for other in others)]  # old scores know no bytes
    found: dict[str, Any] = {"scores": {name: over_seeds([s[name] for s in samples.values()]) for name in names}}
    paired = [(samples[seed], dense[seed]) for seed in samples if seed in dense]
    if paired:
        found["perplexity_ratio"] = over_seeds([_mean_ratio(*pair, ["perplexity"]) for pair in paired])
        metrics = [n for n in names if n not in (*OF_TEXT, *unclear) and all(own[n][0] > 0 for _, own in paired)]
        if metrics or unclear:
            mean = over_seeds([_mean_ratio(*pair, metrics) for pair in paired]) if metrics else None
            found["relative_performance"] = mean
    return found


def _mean_ratio(ours: dict[str, Samples], theirs: dict[str, Samples], names: list[str]) -> Samples:
    """Mean over the named scores of ours / theirs, point by point and resample by resample."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [[a / b for a, b in zip(ours[name], theirs[name], strict=True)] for name in names]
    return np.mean([point for point, _ in ratios], axis=0), np.mean([drawn for _, drawn in ratios], axis=0)
