"""Metrics of classification, from a confusion table."""

from __future__ import annotations

from collections.abc import Sequence

Confusion = dict[str, dict[str, int]]
"""Counts by truth, then by prediction."""


def confusion_table(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> Confusion:
    """Counts of every (truth, prediction) pair of labels."""
    table = {true: {guess: 0 for guess in labels} for true in labels}
    for true, guess in zip(truth, predicted, strict=True):
        table[true][guess] += 1
    return table


def accuracy(table: Confusion) -> float:
    """Share of right predictions, in [0, 1]."""
    return sum(table[label][label] for label in table) / sum(sum(row.values()) for row in table.values())


def macro_f1(table: Confusion) -> float:
    """Unweighted mean over labels of F1 = 2 TP / (truths + predictions), in [0, 1].

    A label that is neither true nor predicted anywhere is left out, as scikit-learn does.
    """
    scores = []
    for label, row in table.items():
        total = sum(row.values()) + sum(other[label] for other in table.values())
        if total:
            scores.append(2 * row[label] / total)
    return sum(scores) / len(scores)
