"""The reading order: permutations, and the same answer from any position."""

import pytest

from atp.training.order import RunOrder


@pytest.mark.parametrize(("size", "total"), [(7, 21), (7, 17), (5, 3), (1, 4), (6, 0)])
def test_every_epoch_is_a_permutation_and_the_run_ends_where_it_should(size, total):
    order = list(RunOrder(size, total, seed=3))
    assert len(order) == len(RunOrder(size, total, seed=3)) == total
    for start in range(0, total, size):
        epoch = order[start : start + size]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size))
        if len(epoch) == size:
            assert set(epoch) == set(range(size))


@pytest.mark.parametrize("start", range(18))
def test_at_continues_what_iteration_gives(start):
    order = RunOrder(7, 21, seed=3)
    read = list(order)
    for count in range(21 - start):
        assert order.at(start, count) == read[start : start + count]


def test_seed_and_epoch_decide():
    read = list(RunOrder(50, 100, seed=1))
    assert read == list(RunOrder(50, 100, seed=1))
    assert read[:50] != read[50:]
    assert read != list(RunOrder(50, 100, seed=2))
    assert RunOrder(50, 0, seed=1).at(75, 20) == read[75:95]
