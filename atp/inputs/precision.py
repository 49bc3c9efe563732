"""The precision of a run's products: asked of the device's features once, and from then on part of the run's config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

import torch

from atp.config import ATPConfig, Definite
from atp.ground.errors import InputError
from atp.inputs.folders import CONFIG, RESOLVED, saved_config
from atp.processes import processes

Precision = Literal["auto", "float32", "bfloat16"]

AUTO: Final = "auto"
# Instructions that multiply bfloat16, as torch names them; Linux writes svebf16. Without one, products take longer.
_INSTRUCTIONS = {"amx_bf16", "avx512_bf16", "bf16", "sve_bf16", "svebf16"}
_DTYPES: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype for torch.autocast, None for plain float32. precision: a definite one, so that nobody asks twice."""
    return _DTYPES[precision]


def precision_at(asked: Precision, *places: str) -> Definite:
    """The precision for models and data at these paths: `auto` is that of the run which a path lies in."""
    if asked != AUTO:
        return asked
    folders = [folder for place in places for folder in (Path(place), Path(place).parent)]
    found = (precision_of(folder, name) for folder in folders for name in (RESOLVED, CONFIG))
    return next((precision for precision in found if precision), None) or of_device(processes.device().type)


def of_device(device: str) -> Definite:
    """bfloat16 where a device of this type has instructions for its products, as GPUs elsewhere are taken to have."""
    if device == "cuda":
        able = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # torch uses a processor's through oneDNN, which its builds for macOS lack; it names none of other devices
        able = device == "cpu" and torch.backends.mkldnn.is_available() and bool(_INSTRUCTIONS & _cpu_features())
    return "bfloat16" if able else "float32"


def slow_precision(config: ATPConfig) -> list[str]:
    """One sentence if the config names a precision that this process's device has no instructions for."""
    if config.training.precision != "bfloat16" or of_device(processes.device().type) == "bfloat16":
        return []
    return [
        "training.precision is bfloat16, for which this device has no instructions: steps take longer than in float32"
    ]


def refuse_open(config: ATPConfig, elsewhere: bool) -> None:
    """Raises `InputError` if this machine would choose the precision of runs on other ones (elsewhere)."""
    if elsewhere and config.training.precision == AUTO:
        raise InputError(
            "training.precision is auto, which this machine would decide for those that do the runs: set it to "
            "bfloat16 or float32"
        )


def precision_of(folder: Path, started: str) -> Definite | None:
    """The precision that a config in a folder holds; None where there is none, or where it leaves that open."""
    precision = (saved_config(folder, started) or {}).get("training", {}).get("precision")
    return precision if precision in _DTYPES else None


def _cpu_features() -> set[str]:
    """What the processor can do: by torch, or where that is too old to say, by Linux."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return {name for name, there in ask().items() if there is True}
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()
