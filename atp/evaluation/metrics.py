"""Metrics as functions of sums over items, so that a score and its bootstrap share their code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ratio(sums: np.ndarray) -> np.ndarray:
    """First column over second: accuracy from [right, 1], mean from [value, 1]."""
    return sums[..., 0] / sums[..., 1]


def perplexity_of(sums: np.ndarray) -> np.ndarray:
    """exp(nll / tokens) from columns [nll (nats), tokens]; infinite instead of an overflow."""
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def bits_per_byte_of(sums: np.ndarray) -> np.ndarray:
    """nll / ln 2 / bytes from columns [nll (nats), tokens, bytes]: compares models whatever their tokens are."""
    return sums[..., 0] / sums[..., 2] / np.log(2)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Unweighted mean over labels of F1 = 2 TP / (truths + predictions), in [0, 1].

    sums: a flattened confusion table [..., labels * labels], truth by prediction. Labels that are neither true nor
    predicted anywhere are left out, as in scikit-learn.
    """
    labels = round(sums.shape[-1] ** 0.5)
    table = sums.reshape(*sums.shape[:-1], labels, labels)
    hits = np.diagonal(table, axis1=-2, axis2=-1)
    total = table.sum(axis=-1) + table.sum(axis=-2)
    seen = total > 0
    scores = np.where(seen, 2 * hits / np.maximum(total, 1), 0.0)
    return scores.sum(axis=-1) / seen.sum(axis=-1)


def right_items(truth: Sequence[str], predicted: Sequence[str]) -> np.ndarray:
    """[right, 1] of every item, float64 [items, 2]."""
    return np.array([[float(true == guess), 1.0] for true, guess in zip(truth, predicted, strict=True)])


def confusion_items(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """The one-hot confusion table of every item, float64 [items, labels * labels]."""
    place = {label: index for index, label in enumerate(labels)}
    cells = [place[true] * len(labels) + place[guess] for true, guess in zip(truth, predicted, strict=True)]
    return np.eye(len(labels) ** 2)[cells]


def confusion_table(confusion: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Counts by truth, then by prediction, from `confusion_items`."""
    counts = confusion.sum(axis=0).reshape(len(labels), len(labels))
    return {
        true: {guess: int(counts[row, column]) for column, guess in enumerate(labels)}
        for row, true in enumerate(labels)
    }
