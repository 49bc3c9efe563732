"""Makes the classes of cut models known to transformers without importing them, which would take seconds.

A stand-in for the config of each family is registered, now or once a program imports transformers' Auto classes. It
imports the real one when it is called, which registers itself in its place, and the model class with it. No import can
set this off, and none may: transformers imports its Auto classes in the midst of the modules that our classes are made
from.
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
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "seed_oss", "gemma2", "gemma3_text", "olmo2", "olmo3",
    "ministral", "ministral3", "ernie4_5", "hunyuan_v1_dense", "exaone4", "phi3", "glm", "glm4", "arcee",
    "nemotron", "jais2", "starcoder2", "apertus", "mixtral", "qwen3_moe", "olmoe", "gpt_oss",
)  # fmt: skip
"""Names of `atp.families`, which cannot be imported here."""


def register_with_transformers() -> None:
    """Registers the stand-ins: now if transformers' Auto classes are imported, else as soon as they are."""
    if _AUTO_CONFIG in sys.modules:
        _register(sys.modules[_AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register(auto: ModuleType) -> None:
    for family in FAMILIES:
        if f"atp_{family}" not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register(f"atp_{family}", _stand_in(auto.PreTrainedConfig, family))


def _stand_in(base: type, family: str) -> type:
    """A config class whose calls, and those of `from_dict` and `from_pretrained`, are the real one's."""

    def real() -> Any:
        return importlib.import_module("atp.models.config").config_class(family)

    def new(cls: type, *values: Any, **keys: Any) -> Any:
        return real()(*values, **keys)

    def from_dict(cls: type, *values: Any, **keys: Any) -> Any:
        return real().from_dict(*values, **keys)

    def from_pretrained(cls: type, *values: Any, **keys: Any) -> Any:
        return real().from_pretrained(*values, **keys)

    calls: dict[str, Any] = {"from_dict": classmethod(from_dict), "from_pretrained": classmethod(from_pretrained)}
    values = {"__module__": __name__, "model_type": f"atp_{family}", "__new__": new, **calls}
    return type("CutConfig", (base,), values)


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
