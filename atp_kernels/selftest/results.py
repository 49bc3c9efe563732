"""What a self-test found, kept per device and versions in the folder of the tuned tables."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from atp_kernels import extension, triton_runtime
from atp_kernels._version import __version__
from atp_kernels.call import OPERATIONS
from atp_kernels.tuning.table import TableError, content_of, device_name, file_name, folder, replace_file

FORMAT = 1
_PACKAGE = Path(__file__).parents[1]
_NEVER_IMPORTED = ("bench.py", "mutants.py")


def path_of(device: torch.device) -> Path | None:
    """Where the outcomes of a device lie; None where nothing is to be kept."""
    place = folder()
    return None if place is None or str(place) == os.devnull else place / f"selftest-{file_name(device)}"


def header(device: torch.device) -> dict[str, object]:
    """What the outcomes depend on; those with another header are not this process's."""
    return {
        "format": FORMAT,
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton_runtime.VERSION,
        "kernels": _kernels(),
    }


def read(device: torch.device) -> dict[str, list[Any]] | None:
    """The outcomes of every operation; None where there are none, or where the file is damaged or of something else.

    Nobody needs to hear of that: testing again replaces it.
    """
    path = path_of(device)
    if path is None:
        return None
    try:
        content = content_of(path)
    except TableError:
        return None
    found = content.pop("outcomes", None)
    if content != header(device) or not isinstance(found, dict) or found.keys() != OPERATIONS.keys():
        return None
    return found if all(map(_is_sound, found.values())) else None


def write(device: torch.device, found: Mapping[str, list[Any]]) -> None:
    """Keep outcomes; where the folder takes none, a warning says so, and the next process tests again."""
    path = path_of(device)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In one step: of processes that test at once each writes a whole file, and the last one stays.
        replace_file(path, json.dumps({**header(device), "outcomes": found}, indent=1) + "\n")
    except OSError as error:
        said = f"What the self-test found cannot be kept in {path.parent} ({error.strerror})"
        warnings.warn(f"{said}: name another folder in ATP_KERNELS_TABLES.", RuntimeWarning, stacklevel=2)


def _is_sound(outcome: Any) -> bool:
    if not isinstance(outcome, list) or len(outcome) != 4:
        return False
    backend, problem, error, seconds = outcome
    return (
        isinstance(backend, str)
        and (problem is None or isinstance(problem, str))
        and (error is None or _is_amount(error))
        and _is_amount(seconds)
    )


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _kernels() -> str:
    """The version of the package and a digest of all that computes: its sources and the extension's binary."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        if path.name not in _NEVER_IMPORTED:
            digest.update(path.read_bytes())
    binary = extension.binary()
    if binary is not None:
        with suppress(OSError):  # replaced while this process runs, as by an upgrade
            digest.update(binary.read_bytes())
    return f"{__version__} {digest.hexdigest()[:12]} {'with' if extension.AVAILABLE else 'without'} C++"
