"""The mutants still fit the sources, and the last report of `mutations.py` covers and kills every one of them."""

import ast
import json
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_breaks_one_place_and_still_parses(mutant):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    broken = source.replace(mutant.old, mutant.new)
    if mutant.compiled:
        assert broken.split() != source.split()  # `mutations.py` stops at what does not compile
    else:
        assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source))


def test_no_mutant_is_there_twice():
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)


def test_report_says_that_every_mutant_was_killed():
    rows = json.loads((ROOT / "tests" / "mutations.json").read_text(encoding="utf-8"))
    assert [row["mutant"] for row in rows] == [str(mutant) for mutant in MUTANTS], "run python tests/mutations.py"
    assert [row["mutant"] for row in rows if row["killed by"] is None] == []
