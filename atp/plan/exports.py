"""Which formats the result of a run fits: one table, a line per format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from atp.config import ATPConfig
from atp.families import family_of

_WHOLE_HEAD_SPACES = ("kv_group",)
"""Mask spaces that leave whole heads of the old width, and MLP channels."""
_DECI_FAMILIES = ("llama", "mistral", "qwen2")
"""Families whose layers llama.cpp's architecture `deci` can hold; SmolLM2 is a `llama`."""


class Reach(NamedTuple):
    """Whether the settings lead to a format; if not, why, and the smallest change that does."""

    name: str
    reachable: bool
    why_not: str | None


@dataclass(frozen=True)
class _Export:
    """A format. why_not: a sentence on what stands against it, or None."""

    name: str
    why_not: Callable[[ATPConfig, PretrainedConfig], str | None]


def _always(config: ATPConfig, shapes: PretrainedConfig) -> str | None:
    return None


def _plain_folder(config: ATPConfig, shapes: PretrainedConfig) -> str | None:
    """A config.json of the family has one number of heads and one MLP width for all layers."""
    changes = []
    if config.decisions.space not in _WHOLE_HEAD_SPACES:
        changes.append(f"decisions.space={_WHOLE_HEAD_SPACES[0]}")
    if not getattr(config.decisions, "uniform", False):
        changes.append("decisions.uniform=true")
    if not changes:
        return None
    needs = "it needs whole heads, equally many in all layers, and equal MLP widths"
    if "uniform" not in type(config.decisions).model_fields:
        return f"{needs}, which no setting promises yet"
    return f"{needs}, which these settings do not promise: set {' and '.join(changes)}"


def _deci(config: ATPConfig, shapes: PretrainedConfig) -> str | None:
    """`deci` has heads and MLP widths per layer, and nothing else that differs between layers."""
    family = family_of(shapes).name
    if family not in _DECI_FAMILIES:
        return f"it holds models of {', '.join(_DECI_FAMILIES)}, and this is {family}: take a model of one of them"
    if config.decisions.space not in _WHOLE_HEAD_SPACES:
        return (
            f"it holds whole heads, and space {config.decisions.space} leaves parts of them: set decisions.space="
            f"{_WHOLE_HEAD_SPACES[0]}"
        )
    return None


EXPORTS = (
    _Export("transformers, with this package", _always),
    _Export("transformers alone: a plain folder of the family", _plain_folder),
    _Export("vLLM, llama.cpp and MLX, from that folder", _plain_folder),
    _Export("GGUF of architecture deci", _deci),
)


def reachable_exports(config: ATPConfig, shapes: PretrainedConfig) -> list[Reach]:
    """Each format with whether the settings reach it. shapes: the config of the model before the cut.

    It says which formats can hold the result, not who writes them.
    """
    found = []
    for export in EXPORTS:
        why_not = export.why_not(config, shapes)
        found.append(Reach(export.name, why_not is None, why_not))
    return found
