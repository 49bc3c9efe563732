"""Metrics against values worked out by hand."""

import pytest

from atp.evaluation.metrics import accuracy, confusion_table, macro_f1


def test_three_classes_by_hand():
    truth = ["yes", "yes", "yes", "no", "no", "maybe"]
    guess = ["yes", "yes", "no", "no", "maybe", "yes"]
    table = confusion_table(truth, guess, ("yes", "no", "maybe"))
    assert table["yes"] == {"yes": 2, "no": 1, "maybe": 0}
    assert accuracy(table) == pytest.approx(3 / 6)
    # F1: yes 2*2/(3+3), no 2*1/(2+2), maybe 0.
    assert macro_f1(table) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)


def test_label_that_never_occurs_is_left_out():
    table = confusion_table(["a", "b"], ["a", "a"], ("a", "b", "c"))
    assert macro_f1(table) == pytest.approx((2 / 3 + 0) / 2)


def test_constant_guess_has_high_accuracy_and_low_f1():
    table = confusion_table(["yes"] * 9 + ["no"], ["yes"] * 10, ("yes", "no"))
    assert accuracy(table) == pytest.approx(0.9)
    assert macro_f1(table) == pytest.approx(18 / 19 / 2)
