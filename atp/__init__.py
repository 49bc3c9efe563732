"""ATP: tune a Llama-like model with LoRA and learn which structures to remove, in one stage (arXiv 2412.14426).

Importing the package registers the per-layer model class with transformers' Auto classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atp.ending import end_interrupted_imports

end_interrupted_imports()  # before the imports that take seconds

from atp.models import register  # noqa: E402
from atp_kernels._version import __version__  # noqa: E402

if TYPE_CHECKING:
    from atp.config import ATPConfig
    from atp.training.trainer import ATPTrainer

__all__ = ["ATPConfig", "ATPTrainer", "__version__"]

register()

_LAZY = {"ATPConfig": "atp.config", "ATPTrainer": "atp.training.trainer"}


def __getattr__(name: str) -> Any:
    """Loads the trainer and config on first use: importing peft takes seconds."""
    if name not in _LAZY:
        raise AttributeError(f"module 'atp' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
