"""The reading order: permutations, and the same answer from any position."""

import itertools

import pytest
import torch

from atp.data.packing import PackedDataset, RaggedDataset
from atp.training.data import GroupedOrder, RunOrder, refit_batch, refit_orders, refit_size, run_order


@pytest.mark.parametrize(("size", "total"), [(7, 21), (7, 17), (5, 3), (1, 4), (6, 0)])
def test_every_epoch_is_a_permutation_and_the_run_ends_where_it_should(size, total):
    order = list(RunOrder(size, total, seed=3))
    assert len(order) == len(RunOrder(size, total, seed=3)) == total
    for start in range(0, total, size):
        epoch = order[start : start + size]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size))
        if len(epoch) == size:
            assert set(epoch) == set(range(size))


def test_at_continues_what_iteration_gives():
    order = RunOrder(7, 21, seed=3)
    read = list(order)
    for start, end in itertools.combinations(range(22), 2):
        assert order.at(start, end - start) == read[start:end]


def test_seed_and_epoch_decide():
    read = list(RunOrder(50, 100, seed=1))
    assert read == list(RunOrder(50, 100, seed=1))
    assert read[:50] != read[50:]
    assert read != list(RunOrder(50, 100, seed=2))
    assert RunOrder(50, 0, seed=1).at(75, 20) == read[75:95]


LENGTHS = torch.randint(1, 500, (403,), generator=torch.Generator().manual_seed(0)).tolist()


def batches(order, size):
    read = list(order)
    return [read[i : i + size] for i in range(0, len(read), size)]


@pytest.mark.parametrize("size", [1, 4, 7])
def test_grouped_batches_are_alike_in_length_and_cover_each_epoch(size):
    whole = len(LENGTHS) // size
    order = batches(GroupedOrder(LENGTHS, size, 2 * whole * size, seed=3), size)
    for epoch in (order[:whole], order[whole:]):
        assert len({index for batch in epoch for index in batch}) == whole * size
    padded = sum(size * max(LENGTHS[i] for i in batch) for batch in order)
    used = sum(LENGTHS[i] for batch in order for i in batch)
    by_chance = batches(RunOrder(len(LENGTHS), 2 * whole * size, seed=3), size)
    assert padded <= 1.05 * used
    if size > 1:
        assert padded < 0.8 * sum(size * max(LENGTHS[i] for i in batch) for batch in by_chance)
    longest = [max(LENGTHS[i] for i in batch) for batch in order[:whole]]
    assert longest != sorted(longest), "batches come in a mixed order"


def test_grouped_order_is_a_function_of_seed_and_position():
    order = GroupedOrder(LENGTHS, 4, 900, seed=3)
    read = list(order)
    assert read == list(GroupedOrder(LENGTHS, 4, 900, seed=3)) != list(GroupedOrder(LENGTHS, 4, 900, seed=4))
    assert read[:400] != read[400:800]
    for start in (0, 4, 398, 399, 401, 872):
        assert order.at(start, 28) == read[start : start + 28]


def test_grouped_order_of_fewer_samples_than_a_batch():
    assert sorted(GroupedOrder([5, 3, 9], 8, 3, seed=0)) == [0, 1, 2]


def test_datasets_choose_their_order():
    ragged = RaggedDataset([([1] * n, [1] * n) for n in (2, 5, 3)])
    windows = PackedDataset(torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long))
    assert type(run_order(ragged, 1, 3, 0)) is GroupedOrder and type(run_order(windows, 1, 3, 0)) is RunOrder


@pytest.mark.parametrize(
    ("length", "windows", "size"),
    [(192, 960, 13), (192, 24, 3), (192, 15, 1), (192, 0, 1), (62.5, 96, 12), (2561, 96, 1), (512, 192, 5)],
)
def test_a_batch_of_the_refit_is_long_enough_and_one_of_eight(length, windows, size):
    assert refit_size(length, windows) == size


@pytest.mark.parametrize("windows", [1, 7, 8, 9, 16, 23, 96, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_every_eighth_batch_of_the_refit_holds_every_eighth_window(windows, padded):
    ids = torch.zeros(120, 64, dtype=torch.long)
    documents = [([1] * length, [1] * length) for length in LENGTHS[:120]]
    data = RaggedDataset(documents) if padded else PackedDataset(ids, ids)
    orders, rows = refit_orders(data, windows, seed=3), run_order(data, 1, 0, seed=3).at(0, windows)
    assert sorted(row for batch in orders for row in batch) == sorted(rows) and all(orders)
    assert {row for batch in orders[7::8] for row in batch} == set(rows[7::8])
    assert len(orders) == windows if windows < 8 else len(orders) % 8 == 0
    longest = refit_size(sum(LENGTHS[:120]) / 120 if padded else 64, windows)
    assert max(map(len, orders)) <= longest + 1
    if windows > 1:
        assert orders != refit_orders(data, windows, seed=4)


def test_the_refit_reads_documents_of_like_length_together():
    data = RaggedDataset([([1] * length, [1] * length) for length in LENGTHS])
    orders = refit_orders(data, 96, seed=3)
    assert [len(rows) for rows in orders] == [6] * 16  # of 248 tokens on average
    read = [[LENGTHS[row] for row in rows] for rows in orders]
    assert sum(6 * max(lengths) for lengths in read) < 1.1 * sum(map(sum, read))
    batch = refit_batch(data, orders[0], torch.device("cpu"))
    assert batch["text"].sum(1).tolist() == [LENGTHS[row] for row in orders[0]]
    assert batch["text"][:, 0].all() and (batch["text"][:, 1:] <= batch["text"][:, :-1]).all()
    assert "text" not in refit_batch(data, orders[0][:1], torch.device("cpu"))
