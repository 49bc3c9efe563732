"""ATP: tune a Llama-like model with LoRA and learn which structures to remove, in one stage (arXiv 2412.14426).

Importing the package loads neither torch nor transformers. It makes the class of a cut model known to transformers'
Auto classes, now if they are there already and else when a program imports them.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from atp.ground.ending import end_interrupted_imports, end_without_packages, is_command, lacking
from atp.models.registration import register_with_transformers

if TYPE_CHECKING:
    from atp.config import ATPConfig
    from atp.run import Run
    from atp.training.trainer import ATPTrainer
    from atp_kernels._version import __version__

__all__ = ["ATPConfig", "ATPTrainer", "Run", "__version__"]

if is_command():
    end_interrupted_imports()  # before the imports that take seconds
    end_without_packages()
else:
    end_without_packages("transformers")  # without which a program can use nothing of this package
register_with_transformers()

_LAZY = {
    "ATPConfig": "atp.config", "ATPTrainer": "atp.training.trainer", "Run": "atp.run",
    "__version__": "atp_kernels._version",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loads what torch or peft must be imported for, which takes seconds, on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'atp' has no attribute '{name}'")
    # transformers imports torchao where it is installed, which reports every kernel for GPUs that it cannot load here.
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        raise lacking(error) from None
    finally:
        logging.disable(disabled)
