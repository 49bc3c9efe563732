"""The model class of a cut model: per-layer widths, known to transformers once package `atp` is imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atp.models.config import ATPLlamaConfig, LayerShape
    from atp.models.llama import ATPLlamaForCausalLM, ATPLlamaModel, register

__all__ = ["ATPLlamaConfig", "ATPLlamaForCausalLM", "ATPLlamaModel", "LayerShape", "register"]


def __getattr__(name: str) -> Any:
    """Loads the model class, for which torch must be imported, on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'atp.models' has no attribute '{name}'")
    room = "config" if name in ("ATPLlamaConfig", "LayerShape") else "llama"
    return getattr(importlib.import_module(f"atp.models.{room}"), name)
