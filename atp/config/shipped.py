"""Examples and experiments that ship with the package: at the root of a clone, in `atp/_shipped` of an install."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE / "_shipped" if (_PACKAGE / "_shipped").is_dir() else _PACKAGE.parent
_FOLDERS = ("examples", "experiments")


def find(path: Path) -> Path:
    """Resolves a file such as examples/custom.yaml: at the given path, else the one shipped with the package.

    Returns the path itself if there is neither.
    """
    if path.is_file() or path.parts[:1] not in [(folder,) for folder in _FOLDERS]:
        return path
    return _ROOT / path if (_ROOT / path).is_file() else path


def names(folder: str) -> list[str]:
    """Names of the YAML files in a folder of examples or experiments, here and in the package."""
    return sorted({file.stem for root in (Path(), _ROOT) for file in (root / folder).glob("*.yaml")})
