"""What the result of a mutant depends on, as a hash: the report of `mutations.py` goes stale by itself."""

import ast
import functools
import hashlib
import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path

from mutants import Mutant

ROOT = Path(__file__).parents[1]


def fingerprint(mutant: Mutant) -> str:
    """16 hex digits over the mutant, the code of its file, and the code of the test files of its selection.

    Code is a file without comments, docstrings and blank lines, so prose may change. Helpers that a test file imports
    from beside it, and conftest.py, count as part of it. Other sources do not: a mutant is about its own file.
    """
    parts = [mutant.old, mutant.new, mutant.tests, code(ROOT / mutant.file)]
    parts += [code(path) for path in test_files(mutant.tests)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def test_files(selection: str) -> tuple[Path, ...]:
    """The files that a pytest selection runs, and those that they import from their own folders, in a fixed order."""
    names = [word.partition("::")[0] for word in shlex.split(selection)]
    found = {ROOT / "tests" / "conftest.py"}
    waiting = [ROOT / name for name in names if name.endswith(".py")]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [
                path.with_name(f"{name}.py") for name in imported(path) if path.with_name(f"{name}.py").exists()
            ]
    return tuple(sorted(found))


def imported(path: Path) -> Iterator[str]:
    """Names of the top-level modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@functools.cache
def code(path: Path) -> str:
    """The text of a Python or C++ file without comments, docstrings and blank lines."""
    text = path.read_text(encoding="utf-8")
    text = _python_code(text) if path.suffix == ".py" else re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _python_code(text: str) -> str:
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)
