"""The layers of the house: imports run downwards only, files stay short."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import docs_site  # noqa: E402

PACKAGES = ("atp_kernels", "atp")
# From top to bottom. A module belongs to the longest name here that it starts with, and may import from its own layer
# and those below. Entries of one line are one layer.
LAYERS = (
    ("atp.__main__", "atp.cli"),
    ("atp.studies",),
    ("atp.run",),
    ("atp.plan",),
    ("atp.training", "atp.integrations", "atp.baselines", "atp.export", "atp.report"),
    ("atp.inputs",),
    ("atp.vocabulary",),
    ("atp.removal", "atp.lora", "atp.data", "atp.evaluation"),
    ("atp.sharding",),
    ("atp.models",),
    ("atp.decide",),
    ("atp.config",),
    ("atp.spaces",),
    ("atp.families",),
    ("atp.processes",),
    ("atp.ground",),
    ("atp_kernels",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# `import atp` makes the model class known to transformers, so that a cut model loads, and lets Ctrl-C end the command
# while torch is imported; that is all the package itself may reach for.
ROOT_MAY_IMPORT = {"atp.models", "atp.ground", "atp_kernels"}
# A room's bench.py is a part of the benchmarks, which know all packages; the kernels never import it.
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "bench.py"
}


def layer(module):
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in names if name in RANK), None)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@functools.cache
def imported(path, *, everywhere=True):
    """Names of the modules a file imports, also inside functions if `everywhere`, without those for type checkers."""
    found, stack = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while stack:
        node = stack.pop()
        if is_type_checking(node) or (not everywhere and isinstance(node, ast.FunctionDef)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else node.module for name in names}
        stack.extend(ast.iter_child_nodes(node))
    return found


def ours(path, **options):
    return {name for name in imported(path, **options) if name.split(".")[0] in PACKAGES}


def test_imports_run_downwards():
    for module, target in ((name, target) for name in SOURCES for target in ours(SOURCES[name])):
        assert target in SOURCES, f"{module} imports {target}, which does not exist"
        if module == "atp":
            assert layer(target) in ROOT_MAY_IMPORT, f"atp itself imports {target}"
            continue
        assert target != "atp", f"{module} imports the package instead of a module of it"
        assert layer(module) and layer(target), f"{module} or {target} has no place in LAYERS"
        assert RANK[layer(target)] >= RANK[layer(module)], f"{module} imports {target}, which lies above it"


def test_no_import_cycles():
    """Python runs the packages above a module first, so importing a module counts as importing those too."""
    graph = {name: ours(path, everywhere=False) & SOURCES.keys() for name, path in SOURCES.items()}
    done = set()

    def visit(name, trail):
        assert name not in trail, "import cycle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_every_layer_holds_a_module_and_few_files_stand_outside_the_rooms():
    assert [name for name in RANK if not any(f"{m}.".startswith(f"{name}.") for m in SOURCES)] == []
    assert len(RANK) == sum(map(len, LAYERS)), "a name stands in two layers"
    assert len(list((ROOT / "atp").glob("*.py"))) <= 6


def test_the_architecture_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([\w./]+)` \|", page, re.MULTILINE)
    rooms = [name.replace(".", "/") for names in LAYERS for name in names]
    assert told == [name + ("/" if (ROOT / name).is_dir() else ".py") for name in rooms] + ["csrc/"]


def test_every_source_file_says_what_it_is_for_and_test_files_have_names_of_their_own():
    files = [p for folder in (*PACKAGES, "csrc") for p in (ROOT / folder).rglob("*")]
    assert [p for p in files if p.suffix in {".py", ".cpp", ".cu", ".h"} and not docs_site.purpose(p)] == []
    # Without packages around them pytest imports test files by their bare names, and takes one name once.
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_kernels_know_no_model_and_models_are_read_in_one_place():
    for module, path in SOURCES.items():
        if module.split(".")[0] == "atp_kernels":
            roots = {name.split(".")[0] for name in imported(path)}
            assert not roots & {"transformers", "peft", "accelerate", "datasets", "atp"}, module
    # Who loads past `atp.models.load` loads without its checks.
    pattern = r"\b(Auto\w+|LlamaForCausalLM|PreTrained\w+|Pretrained\w+)\.from_pretrained\("
    found = [name for name, path in SOURCES.items() if re.search(pattern, path.read_text(encoding="utf-8"))]
    assert found == ["atp.export.card", "atp.models.load"], "the card only shows how a user loads"


@pytest.mark.parametrize("folder", [*PACKAGES, "csrc"])
def test_no_file_is_longer_than_600_lines(folder):
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cpp", ".cu", ".cuh", ".h", ".hpp"}]
    assert files
    lines = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert {name: count for name, count in lines.items() if count > 600} == {}
