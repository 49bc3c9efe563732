"""Private names of libraries that we use: each is listed here, and its library has an upper version bound."""

import ast
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PRIVATES = {
    "_attn_implementation": "transformers",  # which attention a loaded config asks for
    "_register_custom_module": "peft",  # our LoRA layer under PEFT's own adapter
    "_forward_pre_hooks": "torch",  # whether somebody waits for the input of a linear that a block takes over
}
# Public by their documentation, whatever the underscore says.
PUBLIC = {"os._exit"}
NAMED_TUPLE = {"_fields", "_replace", "_asdict"}
SOURCES = [path for package in ("atp", "atp_kernels") for path in sorted((ROOT / package).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def own_names():
    """Names that the project itself defines: functions, classes, attributes, variables and fields."""
    found = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def foreign_privates():
    """{private name: first place} of everything with an underscore that is read from elsewhere."""
    own, found = own_names() | NAMED_TUPLE, {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute) and ast.unparse(node) not in PUBLIC:
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ("atp", "atp_kernels"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            for name in names:
                if re.match(r"_[^_]", name) and name not in own:
                    found.setdefault(name, f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_private_names_of_libraries_are_those_listed():
    found = foreign_privates()
    assert {name: place for name, place in found.items() if name not in PRIVATES} == {}
    assert found.keys() == PRIVATES.keys(), "a name that nothing uses may leave the list"


def test_upper_bounds_are_where_private_names_are_used_and_nowhere_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounded = {}
    for line in project["dependencies"]:
        requirement = Requirement(line)
        if any(part.operator in ("<", "<=", "==", "~=") for part in requirement.specifier):
            bounded[requirement.name] = requirement.specifier
    assert bounded.keys() == set(PRIVATES.values())
    for name, specifier in bounded.items():
        assert version(name) in specifier, f"{name} {version(name)} is outside {specifier}"
