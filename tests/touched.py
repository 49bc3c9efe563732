"""The files of slow tests that a change reaches: those that import a changed module, also through others.

    python tests/touched.py [BASE]     files, one per line; BASE is a commit, by default the one before this

`.ci/run` runs the slow tests in them beside `make test`. A change of build files or of C++ reaches all.
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOR_ALL = ("setup.py", "pyproject.toml", "Makefile", "csrc/", "tests/conftest.py")


def main() -> None:
    """Prints the files; none where the history does not reach back to BASE."""
    base = sys.argv[1] if len(sys.argv) > 1 else "HEAD~1"
    done = subprocess.run(["git", "diff", "--name-only", base], cwd=ROOT, capture_output=True, text=True, check=False)
    for path in touched(ROOT, done.stdout.split()):
        print(path.relative_to(ROOT))


def touched(root: Path, changed: list[str]) -> list[Path]:
    """Files below tests/ that hold a slow test and are reached by a change of these files."""
    sources = {module(root, path): path for path in python_files(root)}
    graph = {path: {sources[name] for name in imported(path) if name in sources} for path in sources.values()}
    reached = {root / name for name in changed}
    if any(name.startswith(FOR_ALL) for name in changed):
        reached |= set(graph)
    while more := {path for path, targets in graph.items() if targets & reached} - reached:
        reached |= more
    return sorted(
        path for path in reached & set(graph)
        if path.name.startswith("test_") and "mark.slow" in path.read_text(encoding="utf-8")
    )  # fmt: skip


def python_files(root: Path) -> list[Path]:
    """All Python files of the packages, benchmarks and tests."""
    return [path for folder in ("atp", "atp_kernels", "benchmarks", "tests") for path in (root / folder).rglob("*.py")]


def module(root: Path, path: Path) -> str:
    """The name by which others import a file: tests import helpers by their bare names."""
    parts = path.relative_to(root).with_suffix("").parts
    return path.stem if parts[0] == "tests" and path.stem != "__init__" else ".".join(parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, and of the packages that Python runs before them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in found]
    return {".".join(words[:end]) for words in parts for end in range(1, len(words) + 1)}


if __name__ == "__main__":
    main()
