"""The mutants fit the sources, and a fingerprint changes with all that the result of one depends on."""

import ast
import dataclasses
import functools
from pathlib import Path

import fingerprints
import pytest
from fingerprints import fingerprint
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]


@functools.cache
def source_of(file):
    source = (ROOT / file).read_text(encoding="utf-8")
    return source, ast.dump(ast.parse(source)) if file.endswith(".py") else None


def is_sound(mutant):
    source, tree = source_of(mutant.file)
    broken = source.replace(mutant.old, mutant.new)
    if mutant.compiled:
        changed = broken.split() != source.split()  # `mutations.py` stops at what does not compile
    else:
        changed = ast.dump(ast.parse(broken)) != tree
    return changed and source.count(mutant.old) == 1


def test_each_mutant_breaks_one_place_once_and_still_parses():
    assert [str(mutant) for mutant in MUTANTS if not is_sound(mutant)] == []
    assert not is_sound(dataclasses.replace(MUTANTS[0], old="nowhere to be found"))
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.fixture
def small_tree(tmp_path, monkeypatch):
    """A source, a test file and the helper it imports, as `fingerprint` sees them."""
    files = {
        "tests/conftest.py": "import os\n",
        "tests/kernels/test_a.py": "from helper import f\n\n\ndef test_a():\n    assert f() == 1\n",
        "tests/kernels/helper.py": "def f():\n    return 1\n",
        "tests/kernels/other.py": "x = 1\n",
        "source.py": '"""Prose."""\n\n\ndef g(x):\n    """More."""\n    return x + 1  # why\n',
        "source.cpp": "// Why.\nint f() { return 1; } /* here\n and here */\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(fingerprints, "ROOT", tmp_path)
    fingerprints.test_files.cache_clear()
    yield tmp_path
    fingerprints.test_files.cache_clear()
    fingerprints.code.cache_clear()


@pytest.mark.parametrize(
    ("file", "old", "new", "matters"),
    [
        ("source.py", "x + 1", "x + 2", True),
        ("source.py", "# why", "# because", False),
        ("source.py", '"""More."""', '"""Less,\n    and more."""', False),
        ("source.py", "Prose", "Verse", False),
        ("source.cpp", "return 1", "return 2", True),
        ("source.cpp", "// Why.", "// So.", False),
        ("source.cpp", "and here", "and there", False),
        ("tests/kernels/test_a.py", "== 1", "== 2", True),
        ("tests/kernels/helper.py", "return 1", "return 2", True),
        ("tests/conftest.py", "os", "sys", True),
        ("tests/kernels/other.py", "1", "2", False),
    ],
)
def test_a_fingerprint_changes_with_the_code_it_stands_for(small_tree, file, old, new, matters):
    source = file if file.startswith("source") else "source.py"
    mutant = Mutant(source, "return", "pass", "tests/kernels/test_a.py -k 'a or b'")
    before = fingerprint(mutant)
    path = small_tree / file
    path.write_text(path.read_text().replace(old, new))
    fingerprints.code.cache_clear()
    assert (fingerprint(mutant) != before) == matters
    assert fingerprint(dataclasses.replace(mutant, new="raise")) != fingerprint(mutant)
