"""The classes of cut models: per-layer widths, known to transformers once package `atp` is imported."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["CutConfig", "LayerShape", "register"]
_HOME = {"CutConfig": "config", "LayerShape": "config", "register": "cut"}


def __getattr__(name: str) -> Any:
    """Loads classes, for which torch must be imported, on first use: `ATPLlamaForCausalLM`, ... are made there."""
    if name in _HOME:
        return getattr(importlib.import_module(f"atp.models.{_HOME[name]}"), name)
    if name.startswith("ATP"):
        from atp.families import FAMILIES
        from atp.models.config import config_class
        from atp.models.cut import model_classes

        for family in FAMILIES:
            config = config_class(family)
            if name == config.__name__:
                return config
            if name.startswith(config.__name__.removesuffix("Config")):
                return next(kind for kind in model_classes(family) if kind.__name__ == name)
    raise AttributeError(f"module 'atp.models' has no attribute '{name}'")
