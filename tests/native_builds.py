"""Builds of the extension for mutants of C++: all of it once, and then for each mutant what reads the changed file."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Build:
    """An extension, and how each part of it was made: `commands` and `read` belong to an object file."""

    root: Path
    library: Path
    commands: dict[str, str]
    read: dict[str, list[str]]
    link: list[str]


def build(root: Path) -> Build:
    """Build the extension in the tree `root`, for CPUs. Raises RuntimeError where that fails; needs ninja."""
    root = root.resolve()
    settings = {"ATP_BUILD": "1", "ATP_BUILD_CUDA": "0"}
    said = _output([sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", "objects"], root, settings)
    (library,) = (root / "atp_kernels").glob("_C*.so")
    # Ninja only compiles; the command that links is what setuptools says last of all commands.
    link = [line for line in said.splitlines() if " -shared " in line][-1]
    commands = json.loads(_output(["ninja", "-C", "objects", "-t", "compdb"], root))
    parts = [part.split() for part in _output(["ninja", "-C", "objects", "-t", "deps"], root).split("\n\n")]
    return Build(
        root,
        library,
        # No result depends on the level; the lower one compiles in two thirds of the time.
        {command["output"]: command["command"].replace("-O3", "-O1") for command in commands},
        {words[0].removesuffix(":"): words[1:] for words in parts if words},
        shlex.split(link),
    )


def rebuild(known: Build, changed: str, root: Path) -> None:
    """Put the extension into `root`, a copy of the tree of `known` whose file `changed` is another.

    Raises RuntimeError where that does not compile, and where nothing reads the file.
    """
    root = root.resolve()
    stale = [name for name, files in known.read.items() if str(known.root / changed) in files]
    if not stale:
        raise RuntimeError(f"no part of the extension reads {changed}.")
    fresh = {name: name.replace(str(known.root), str(root)) for name in stale}
    for name in stale:
        Path(fresh[name]).parent.mkdir(parents=True, exist_ok=True)
        _output(shlex.split(known.commands[name].replace(str(known.root), str(root))), root)
    library = root / known.library.relative_to(known.root)
    library.unlink(missing_ok=True)
    target = known.link.index("-o") + 1
    link = [fresh.get(word, word) for word in known.link]
    _output([*link[:target], str(library), *link[target + 1 :]], root)


def _output(command: list[str], folder: Path, settings: dict[str, str] | None = None) -> str:
    environment = {**os.environ, **(settings or {})}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stdout}{done.stderr}")
    return done.stdout
