"""Finds code that this project does not write: what runs foreign code, unpickles, or opens a shell.

    python tools/forbidden.py            the packages, tools and benchmarks; one line per finding, and exit status 1
    python tools/forbidden.py FILE ...   these files

It reads the syntax tree, so comments and texts may name what is forbidden, and no line can be exempted.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("atp", "atp_kernels", "benchmarks", "tools", "setup.py")
# They make objects from bytes by calling what the bytes name.
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Keyword of a call: the one value that it may have, written out, and what others can do.
KEYWORDS = {
    "trust_remote_code": (False, "can run code of a model's or data set's repository"),
    "shell": (False, "can hand a text to a shell"),
    "use_safetensors": (True, "can read pickled weights"),
    "safe_serialization": (True, "can write pickled weights"),
    "weights_only": (True, "can unpickle whatever the file names"),
    "allow_pickle": (False, "can unpickle an array file"),
}
CALLS = {
    "eval": "runs a text",
    "exec": "runs a text",
    "os.system": "hands a text to a shell",
    "os.popen": "hands a text to a shell",
    "torch.save": "writes a pickle: use safetensors",
    "yaml.unsafe_load": "makes any object: use yaml.safe_load",
    "yaml.full_load": "makes objects: use yaml.safe_load",
    "yaml.load_all": "may make any object: use yaml.safe_load_all",
}
SAFE_LOADERS = ("SafeLoader", "CSafeLoader")


def findings(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong there) for a file's text."""
    tree = ast.parse(source)
    safe = {*SAFE_LOADERS, *_subclasses(tree)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] in MODULES:
                    yield node.lineno, f"imports {name}, which unpickles"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _of_call(node, safe))


def _of_call(call: ast.Call, safe: set[str]) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    for keyword, (allowed, why) in KEYWORDS.items():
        if keyword in given and not _is(given[keyword], allowed):
            yield f"{name}({keyword}={ast.unparse(given[keyword])}) {why}"
    if name in CALLS:
        yield f"{name}() {CALLS[name]}"
    if name in ("torch.load", "pd.read_pickle", "pandas.read_pickle"):
        if "weights_only" not in given:
            yield f"{name}() without weights_only=True unpickles whatever the file names"
    if name == "yaml.load":
        loader = given.get("Loader") or (call.args[1] if len(call.args) > 1 else None)
        if loader is None or ast.unparse(loader).split(".")[-1] not in safe:
            yield "yaml.load() without a safe loader makes any object"


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _subclasses(tree: ast.Module) -> set[str]:
    """Classes of a file whose bases are all safe loaders."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases]
    names = (node.name for node in classes if all(ast.unparse(b).split(".")[-1] in SAFE_LOADERS for b in node.bases))
    return set(names)


def main() -> int:
    places = [Path(name) for name in sys.argv[1:]] or [ROOT / name for name in PLACES]
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    found = [f"{file}:{line}: {what}" for file in files for line, what in findings(file.read_text(encoding="utf-8"))]
    print("\n".join(found) if found else f"{len(files)} files without forbidden code")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
