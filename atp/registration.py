"""Makes the class of a cut model known to transformers without importing it, which would take seconds.

Only configs are registered once transformers' Auto classes are imported. The model class follows with the first config
of a cut model (`atp.models.config`), which is there before anybody needs it. Earlier it could not: transformers imports
its Auto classes in the midst of the modules that our model class is made from.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Registers `ATPLlamaConfig`: now if transformers' Auto classes are imported, else as soon as they are."""
    if _AUTO_CONFIG in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    importlib.import_module("atp.models.config")


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
            _register()

        setattr(spec.loader, "exec_module", run_and_register)  # noqa: B010  mypy allows no other way
        return spec
