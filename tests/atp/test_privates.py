"""What `atp` uses of other libraries' privates: little, named here, and below a version that is known to have it."""

import ast
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "atp").rglob("*.py"))
# Name -> package whose version has an upper bound for it. None: documented by its library, underscore or not.
PRIVATES = {
    "_register_custom_module": "peft",
    "_apply_gate": "transformers",
    "_attn_implementation": None,  # how transformers' guide to custom attention reads it
    "_experts_implementation": None,  # the same of experts
    "_asdict": None,  # a named tuple's, as the library reference describes it
    "_exit": None,  # os._exit
    "_version": None,  # a tensor's version counter, as torch's notes on autograd describe it
}


def privates(path):
    """Names with a leading underscore that a file takes from elsewhere: attributes it defines nowhere, and imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    of_self = [node for node in attributes if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")]
    own |= {node.attr for node in of_self if isinstance(node.ctx, ast.Store)}
    found = {node.attr for node in attributes if node not in of_self} - own
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] not in ("atp", "atp_kernels"):
            found |= {part for name in node.names for part in (*node.module.split("."), name.name)}
    return {name for name in found if re.match(r"_[^_]", name)}


def test_no_private_of_another_library_but_those_named_here():
    found = {name: str(path.relative_to(ROOT)) for path in SOURCES for name in privates(path)}
    assert found.keys() == PRIVATES.keys(), found


@pytest.mark.parametrize("package", sorted({package for package in PRIVATES.values() if package}))
def test_its_library_has_an_upper_bound(package):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (requirement,) = [Requirement(line) for line in re.findall(rf'^ +"({package}\W.*?)"', text, flags=re.MULTILINE)]
    assert any(bound.operator in ("<", "<=", "==") for bound in requirement.specifier), requirement
    assert requirement.specifier.contains(version(package))
