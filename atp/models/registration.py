"""Makes the class of a cut model known to transformers without importing it, which would take seconds.

A stand-in for its config is registered, now or once a program imports transformers' Auto classes. It imports the real
one when it is called, which registers itself in its place, and the model class with it. No import can set this off, and
none may: transformers imports its Auto classes in the midst of the modules that our classes are made from.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_MODEL_TYPE, _NAME = "atp_llama", "ATPLlamaConfig"


def register_with_transformers() -> None:
    """Registers the stand-in: now if transformers' Auto classes are imported, else as soon as they are."""
    if _AUTO_CONFIG in sys.modules:
        _register(sys.modules[_AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register(auto: ModuleType) -> None:
    if _MODEL_TYPE not in auto.CONFIG_MAPPING:
        auto.AutoConfig.register(_MODEL_TYPE, _stand_in(auto.PreTrainedConfig))


def _stand_in(base: type) -> type:
    """A config class whose calls, and those of `from_dict` and `from_pretrained`, are the real one's."""

    def real() -> Any:
        return getattr(importlib.import_module("atp.models.config"), _NAME)

    def new(cls: type, *values: Any, **keys: Any) -> Any:
        return real()(*values, **keys)

    def from_dict(cls: type, *values: Any, **keys: Any) -> Any:
        return real().from_dict(*values, **keys)

    def from_pretrained(cls: type, *values: Any, **keys: Any) -> Any:
        return real().from_pretrained(*values, **keys)

    calls: dict[str, Any] = {"from_dict": classmethod(from_dict), "from_pretrained": classmethod(from_pretrained)}
    return type(_NAME, (base,), {"__module__": __name__, "model_type": _MODEL_TYPE, "__new__": new, **calls})


class _WhenImported(MetaPathFinder):
    """Finds that one module as Python would, and registers when it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AUTO_CONFIG or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        setattr(spec.loader, "exec_module", run_and_register)  # noqa: B010  mypy allows no other way
        return spec
