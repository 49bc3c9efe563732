"""ATP: tune a Llama-like model with LoRA and learn which structures to remove, in one stage (arXiv 2412.14426).

Importing the package registers the per-layer model class with transformers' Auto classes. In the command `atp` the
modules that read models do, so that its help need not wait for torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from atp.ending import end_interrupted_imports, end_without_packages, is_command, lacking

if TYPE_CHECKING:
    from atp.config import ATPConfig
    from atp.training.trainer import ATPTrainer
    from atp_kernels._version import __version__

__all__ = ["ATPConfig", "ATPTrainer", "__version__"]


def _register() -> None:
    # transformers imports torchao where it is installed, which reports every kernel for GPUs that it cannot load here.
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        importlib.import_module("atp.models")
    except ModuleNotFoundError as error:  # the kernels are installed without the extra `train`
        raise lacking(error) from None
    finally:
        logging.disable(disabled)


if is_command():
    end_interrupted_imports()  # before the imports that take seconds
    end_without_packages()
else:
    _register()

_LAZY = {"ATPConfig": "atp.config", "ATPTrainer": "atp.training.trainer", "__version__": "atp_kernels._version"}


def __getattr__(name: str) -> Any:
    """Loads what torch or peft must be imported for, which takes seconds, on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'atp' has no attribute '{name}'")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        raise lacking(error) from None
