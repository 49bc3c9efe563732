"""Which modules of a decoder may be fused: those that still run what transformers defines for them."""

from __future__ import annotations

from typing import Any

from torch import nn


class Hooked(nn.Module):
    """Mixin for modules of ours that a larger one may compute without calling them."""

    @property
    def hooked(self) -> bool:
        """As the function says of this module."""
        return hooked(self)


def hooked(module: nn.Module) -> bool:
    """Whether somebody waits for a module's call: a hook, or a forward of this object's own."""
    own = vars(module)
    return "forward" in own or bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


def runs_stock_forward(module: nn.Module) -> bool:
    """Whether class and forward are those of transformers, and nobody serves the module or its functions.

    Liger puts its own class or forward there, on the class or on the object, and `kernelize` a kernel's forward on the
    object. Where a function is defined tells them apart: `functools.wraps` copies its name and module, not its globals.
    """
    kind = type(module)
    forward: Any = kind.forward
    if _home(forward).startswith("kernels.") and not any("forward" in vars(f) for f in _kernel_functions(module)):
        forward = getattr(forward, "__wrapped__", forward)
    return "forward" not in vars(module) and all(
        name.startswith("transformers.") for name in (kind.__module__, _home(forward))
    )


def _kernel_functions(module: nn.Module) -> list[nn.Module]:
    """The functions that Hugging Face `kernels` lets `kernelize` replace, each as a module of its own.

    Where that package is installed, transformers wraps the forward of an attention so that it calls these.
    """
    return list(vars(module).get("_kernel_funcs", {}).values())


def _home(function: Any) -> str:
    """Name of the module that defines a function."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))
