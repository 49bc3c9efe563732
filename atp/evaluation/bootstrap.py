"""Bootstrap intervals of scores that depend only on sums over items, as all of ours do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""From sums over items, float64 [..., columns], to a score, float64 [...]."""

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
