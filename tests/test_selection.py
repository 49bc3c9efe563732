"""Which tests run when: pairs of a grid by default, all of it with --all, and the slow ones that a change reaches."""

import re
from pathlib import Path

from touched import touched

pytest_plugins = "pytester"
HERE = Path(__file__).parent
GRID = """
import pytest

@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", "xyz")
@pytest.mark.parametrize(("c", "d"), [(1, 2), (3, 4)])
def test_grid(a, b, c, d): print("point", a, b, c, d)

@pytest.mark.parametrize("case", range(40))
def test_list(case): pass

@pytest.mark.slow
def test_slow(): pass
"""


def passed(pytester, *options):
    result = pytester.runpytest_inprocess("-q", "-s", "-p", "no:cacheprovider", *options)
    return result.parseoutcomes()["passed"], re.findall(r"point (\d) (\w) (\d) (\d)", result.stdout.str())


def test_each_pair_of_a_grid_runs_and_all_of_it_on_request(pytester):
    pytester.makeconftest((HERE / "conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers = slow: x\n")
    pytester.makepyfile(test_it=GRID)
    count, points = passed(pytester)
    assert count == 40 + len(points) and 9 <= len(points) < 18, "a list of cases is no grid"
    assert {(a, b) for a, b, _, _ in points} == {(a, b) for a in "012" for b in "xyz"}
    assert {(a, c) for a, _, c, _ in points} == {(a, c) for a in "012" for c in "13"}
    assert {(b, c) for _, b, c, _ in points} == {(b, c) for b in "xyz" for c in "13"}
    assert passed(pytester, "--all")[0] == 40 + 18 + 1
    assert passed(pytester, "test_it.py::test_slow")[0] == 1, "whoever names a test means it"


def test_a_change_reaches_the_slow_tests_that_import_it(tmp_path):
    files = {
        "atp/ground/low.py": "",
        "atp/high.py": "from atp.ground import low\n",
        "atp/other.py": "",
        "tests/helper.py": "def f():\n    import atp.high\n",
        "tests/test_a.py": "import helper  # mark.slow\n",
        "tests/test_b.py": "import atp.other  # mark.slow\n",
        "tests/test_c.py": "import helper\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    a, b = tmp_path / "tests/test_a.py", tmp_path / "tests/test_b.py"
    assert touched(tmp_path, ["atp/ground/low.py"]) == [a]
    assert touched(tmp_path, ["atp/other.py"]) == [b]
    assert touched(tmp_path, ["tests/test_a.py", "docs/x.md"]) == [a]
    assert touched(tmp_path, ["csrc/module.cpp"]) == [a, b]
