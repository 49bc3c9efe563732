"""Which modules of a decoder may be fused: those that still run what transformers defines for them."""

from __future__ import annotations

from torch import nn


def runs_stock_forward(module: nn.Module) -> bool:
    """Whether class and forward are those of transformers, and nobody serves the module in their place.

    Liger puts its own class or forward there, on the class or on the object, and `kernelize` a kernel's forward on the
    object. Where a function is defined tells them apart: `functools.wraps` copies its name and module, not its globals.
    """
    kind = type(module)
    home = getattr(kind.forward, "__globals__", {}).get("__name__", "")
    return "forward" not in vars(module) and all(name.startswith("transformers.") for name in (kind.__module__, home))
