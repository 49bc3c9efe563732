"""Lays atp_kernels out for the Hugging Face library `kernels`: a project for kernel-builder, and its builds.

    python tools/hub_kernel.py [--out build/hub]

The folder gets build.toml, flake.nix and CARD.md from tools/hub, torch-ext/atp_kernels with the sources, and for each
backend of build.toml build/torch-BACKEND, as kernel-builder makes it of a kernel in Python. `kernels` imports a build
under a name of its own, so that several fit into a process: imports become relative, and operators are registered under
that name. The extension and what needs it stay behind.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = {"bench.py", "mutants.py", "native.py", "offline.py"}
NO_EXTENSION = "this build for the Hugging Face Hub is Python and Triton alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub")
    out = parser.parse_args().out
    files = sources(ROOT / "atp_kernels")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "tools" / "hub", out)
    shutil.copy(ROOT / "LICENSE", out)
    write(out / "torch-ext" / "atp_kernels", files)
    general = tomllib.loads((out / "build.toml").read_text(encoding="utf-8"))["general"]
    for backend in general["backends"]:
        write(out / "build" / f"torch-{backend}", files | {"metadata.json": metadata(general, backend, files)})
    print(f"{out}: builds for {', '.join(general['backends'])}")


def sources(package: Path) -> dict[str, str]:
    """Texts by path inside the package, as they work under any name."""
    found = {"_C.missing": NO_EXTENSION}
    for path in sorted(package.rglob("*.py")):
        if path.name not in LEFT_OUT:
            inside = path.relative_to(package)
            found[inside.as_posix()] = under_any_name(path.read_text(encoding="utf-8"), len(inside.parts))
    return found


def under_any_name(text: str, depth: int) -> str:
    """A module's text with the package's name taken from where it runs; depth: 1 for modules of the package itself."""
    text = re.sub(r"^(\s*from )atp_kernels(?:\.([\w.]+))?(?= import)", rf"\1{'.' * depth}\2", text, flags=re.MULTILINE)
    return re.sub(r'(?<!\w)"atp_kernels(?=[.:])', '__name__.partition(".")[0] + "', text)


def metadata(general: dict, backend: str, files: dict[str, str]) -> str:
    """metadata.json of a build. Its id is the name under which `kernels` imports it."""
    module = general["name"].replace("-", "_")
    hashes = {name: hashlib.sha256(text.encode()).digest() for name, text in sorted(files.items())}
    content = hashlib.sha256(b"".join(hashes.values())).hexdigest()
    described = {
        "name": general["name"],
        "id": f"_{module}_{backend}_{content[:7]}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {name: base64.b64encode(h).decode() for name, h in hashes.items()}},
    }
    return json.dumps(described, indent=2) + "\n"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
