"""Metrics and their bootstrap against values worked out by hand, and against normal theory."""

import math

import numpy as np
import pytest

from atp.evaluation.bootstrap import percentile_interval, resampled, score_with_interval
from atp.evaluation.metrics import confusion_items, confusion_table, macro_f1, perplexity_of, ratio, right_items


@pytest.mark.parametrize(
    ("truth", "guess", "accuracy", "f1"),
    [
        # F1: yes 2*2/(3+3), no 2*1/(2+2), maybe 0.
        ("yes yes yes no no maybe", "yes yes no no maybe yes", 3 / 6, (4 / 6 + 2 / 4 + 0) / 3),
        ("yes no", "yes yes", 1 / 2, (2 / 3 + 0) / 2),  # a label that never occurs is left out
        ("yes " * 9 + "no", "yes " * 10, 0.9, 18 / 19 / 2),
    ],
)
def test_accuracy_and_f1_by_hand(truth, guess, accuracy, f1):
    truth, guess, labels = truth.split(), guess.split(), ("yes", "no", "maybe")
    items = confusion_items(truth, guess, labels)
    assert ratio(right_items(truth, guess).sum(axis=0)) == pytest.approx(accuracy)
    assert float(macro_f1(items.sum(axis=0))) == pytest.approx(f1)
    table = confusion_table(items, labels)
    assert table["yes"] == {label: list(zip(truth, guess, strict=True)).count(("yes", label)) for label in labels}


def test_perplexity_weighs_documents_by_tokens():
    documents = np.array([[10.0, 5.0], [1.0, 20.0]])
    assert perplexity_of(documents.sum(axis=0)) == pytest.approx(math.exp(11 / 25))
    assert perplexity_of(np.array([1e6, 1.0])) == math.inf


def test_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    low, high = score_with_interval("mean", np.stack([values, np.ones(400)], axis=1), ratio)["mean_interval"]
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        right = (rng.random(120) < 0.7).astype(float)
        draws = resampled(np.stack([right, np.ones(120)], axis=1), ratio, seed=trial, resamples=300)
        low, high = percentile_interval(draws)
        covered += low <= 0.7 <= high
    # Binomial(200, 0.95): below 180 with probability 0.2 %.
    assert covered >= 180


def test_draws_resample_whole_items_and_depend_on_the_seed_alone():
    items = np.eye(6)
    sums = resampled(items, lambda sums: sums, seed=1, resamples=50)
    assert sums.shape == (50, 6) and (sums.sum(axis=1) == 6).all() and (sums == sums.round()).all()
    assert np.array_equal(sums, resampled(items, lambda sums: sums, seed=1, resamples=50))
    assert not np.array_equal(sums, resampled(items, lambda sums: sums, seed=2, resamples=50))
