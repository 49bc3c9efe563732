"""Which tests `make test` runs, and where Triton runs without a GPU.

By default a grid of parameters is run at some of its points, so that each pair of values meets at least once, and tests
marked slow are left out. With --all every test runs (`make test-all`).
"""

import gc
import os
from collections import defaultdict
from dataclasses import fields, is_dataclass
from itertools import combinations

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be chosen before triton is imported

LARGE = 12  # tests: a smaller grid is run whole


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="whole grids, and tests marked slow (`make test-all`)")


def pytest_collection_modifyitems(config, items):
    named = any("::" in argument for argument in config.args)  # whoever names a test means it
    if config.option.all or named:
        return
    grids = defaultdict(list)
    for item in items:
        grids[item.nodeid.partition("[")[0]].append(item)
    kept = {item for grid in grids.values() for item in (pairwise(grid) if len(grid) > LARGE else grid)}
    kept = {item for item in kept if item.get_closest_marker("slow") is None}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish(session):
    freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item, nextitem):
    """What one file leaves behind, such as the libraries that it imported, is not searched in those that follow."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        freeze()
    return result


def pytest_sessionfinish(session):
    gc.unfreeze()  # nanobind takes what the interpreter does not collect at its end for leaks


def freeze():
    """Every run collects garbage several times; modules and collected tests, which all stay, need no search then."""
    gc.collect()
    gc.freeze()


def pairwise(grid):
    """Some tests of a grid, in its order, in which each pair of values of two axes occurs that occurs in the grid."""
    points = [axes(item) for item in grid]
    if len(points[0]) < 2:
        return grid
    left = {pair for point in points for pair in combinations(point, 2)}
    chosen = set()
    while left:  # the point with most pairs that no other has brought
        best = max(range(len(grid)), key=lambda index: len(left & set(combinations(points[index], 2))))
        chosen.add(best)
        left -= set(combinations(points[best], 2))
    return [item for index, item in enumerate(grid) if index in chosen]


def axes(item):
    """(Name, what tells its values apart) of each axis of a grid: names set together are one, a field is its own."""
    found = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        values = [item.callspec.params[name.strip()] for name in names]
        if len(values) == 1 and is_dataclass(values[0]):
            found |= {field.name: repr(getattr(values[0], field.name)) for field in fields(values[0])}
        else:
            found[",".join(names)] = str([id(value) for value in values])
    return tuple(sorted(found.items()))
