"""Bootstrap intervals of scores that depend only on sums over items, as all of ours do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""From sums over items, float64 [..., columns], to a score, float64 [...]."""

Samples = tuple[np.ndarray, np.ndarray]
"""A score [], and the same score on resampled test items [resamples]."""

RESAMPLES = 1000
COVERAGE = 0.95


def resampled(items: np.ndarray, statistic: Statistic, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """The statistic of `resamples` samples drawn with replacement from the items, float64 [resamples].

    items: float64 [items, columns], one row per document or question. The draws depend only on the seed and the number
    of items, so two models scored on the same items are compared on the same samples.
    """
    rng, count = np.random.default_rng(seed), len(items)
    weights = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples))
    return statistic(np.stack([drawn @ items for drawn in weights]))


def percentile_interval(values: np.ndarray) -> list[float]:
    """[low, high] of the middle 95 % of the resampled values (percentile bootstrap, Efron 1979)."""
    tail = (1 - COVERAGE) / 2
    return [float(bound) for bound in np.quantile(values, [tail, 1 - tail])]


def score_with_interval(name: str, items: np.ndarray, statistic: Statistic, seed: int = 0) -> dict[str, object]:
    """{name: the score over all items, name_interval: its 95 % interval}."""
    items = np.asarray(items, dtype=np.float64)
    interval = percentile_interval(resampled(items, statistic, seed))
    return {name: float(statistic(items.sum(axis=0))), f"{name}_interval": interval}


def over_seeds(samples: Sequence[Samples]) -> dict[str, Any]:
    """{value: mean over seeds, interval: 95 %}; with one seed the interval is over test items alone.

    A resample draws the seeds with replacement and averages their scores on the same resampled items.
    """
    draws = np.stack([drawn for _, drawn in samples])
    count, resamples = draws.shape
    chosen = np.random.default_rng(0).integers(count, size=(resamples, count))
    means = draws[chosen, np.arange(resamples)[:, None]].mean(axis=1)
    value = statistics.fmean(float(point) for point, _ in samples)
    # A resample in which the dense model gets nothing right has no ratio.
    return {"value": value, "interval": percentile_interval(means[np.isfinite(means)])}
