"""Which forms the result of a run fits: one table, a line per form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from atp.config import ATPConfig
from atp.export.gguf import architecture_of
from atp.export.quantized import SCHEMES
from atp.families import ExpertFamily, family_of, layer_config
from atp.ground.errors import InputError
from atp.models.config import CutConfig
from atp.models.stock import stock_config
from atp.spaces import WHOLE_WIDTHS
from atp.spaces.space import MaskSpace


class Reach(NamedTuple):
    """Whether the settings lead to a form; if not, why, and the smallest change that does."""

    name: str
    reachable: bool
    why_not: str | None


@dataclass(frozen=True)
class _Export:
    """A form. why_not: a sentence on what stands against it, or None."""

    name: str
    why_not: Callable[[ATPConfig, PretrainedConfig], str | None]


def _always(config: ATPConfig, shapes: PretrainedConfig) -> str | None:
    return None


def _stock(config: ATPConfig, shapes: PretrainedConfig) -> str | None:
    if not (config.decisions.uniform and config.decisions.space in WHOLE_WIDTHS):
        return "it needs whole heads and equal widths in all layers: set preset: stock"
    if stock_config(_cut(config, shapes)) is None:
        return f"transformers has no such class for {family_of(shapes).name}: take a model without sliding windows"
    return None


def _gguf(config: ATPConfig, shapes: PretrainedConfig) -> str | None:
    if config.decisions.space not in WHOLE_WIDTHS:
        return f"it holds whole heads, and space {config.decisions.space} cuts them: set decisions.space=kv_group"
    try:
        architecture_of(_cut(config, shapes), "the result")
    except InputError as error:
        return str(error)
    return None


def _nf4(config: ATPConfig, shapes: PretrainedConfig) -> str | None:
    scheme = SCHEMES["nf4"]
    linears = (
        linear
        for layer in MaskSpace.from_config(shapes, config.decisions.space).linears
        for linear in layer.values()
        if linear.lora
    )
    if any(scheme.fits(linear.out_features, linear.in_features) for linear in linears):
        return None
    return (
        f"no matrix of the decoder has a multiple of {scheme.inputs} inputs and of {scheme.outputs} outputs: 8-bit "
        "weights take any"
    )


def _cut(config: ATPConfig, shapes: PretrainedConfig) -> CutConfig:
    """A config of the form that the cut model's will have: layers of one width, or of two, or one without attention."""
    first = layer_config(shapes, 0)
    key = "num_experts" if isinstance(family_of(shapes), ExpertFamily) else "intermediate_size"
    narrower: dict[int, Any] = {0: {key: getattr(first, key) - 1}}
    if config.decisions.blocks:
        narrower |= {shapes.num_hidden_layers - 1: {"skip": ["attention"]}}
    return CutConfig.from_whole(shapes, per_layer_config=None if config.decisions.uniform else narrower)


EXPORTS = (
    _Export("transformers, with this package", _always),
    _Export("transformers alone, and tools that load its models", _stock),
    _Export("GGUF, for llama.cpp", _gguf),
    _Export("8-bit weights, with torchao", _always),
    _Export("4-bit weights, with bitsandbytes", _nf4),
)


def reachable_exports(config: ATPConfig, shapes: PretrainedConfig) -> list[Reach]:
    """Each form with whether the settings reach it. shapes: the config of the model before the cut."""
    found = []
    for export in EXPORTS:
        why_not = export.why_not(config, shapes)
        found.append(Reach(export.name, why_not is None, why_not))
    return found
