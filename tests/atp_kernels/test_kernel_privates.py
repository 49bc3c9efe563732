"""Which private names of torch the kernels use: each is listed here, and what is asked of it holds."""

import ast
from pathlib import Path

import atp_kernels

FOREIGN = {
    "_C",
    "_autograd",
    "_get_current_graph_task_keep_graph",  # groups.op asks it, below the version that is named there
    "_make_wrapper_subclass",  # quantized.weight, as every tensor that consists of others (torchao's too)
    "_to_copy",  # the same: the operator behind `to`
    "_load_from_state_dict",  # the hook of nn.Module for modules that load in their own way
    "_version",  # kept.sides, to refuse a slice of a weight that changed
}
NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def private(name):
    return name.startswith("_") and not name.startswith("__")


def test_no_other_private_name_is_used():
    used, defined = set(), set()
    for path in Path(atp_kernels.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and private(node.attr):
                (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "_load_from_state_dict":
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
    # `_load_from_state_dict` is called on the parent.
    assert used - defined - NAMED_TUPLES == FOREIGN
