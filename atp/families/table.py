"""The table of families: one line registers one."""

from __future__ import annotations

from transformers import PretrainedConfig

from atp.families.family import Family, UnsupportedModel, is_cut
from atp.families.granite import Granite
from atp.families.llama import Llama, Mistral
from atp.families.qwen2 import Qwen2
from atp.families.qwen3 import Qwen3
from atp.families.refused import REASONS
from atp.families.seed_oss import SeedOss
from atp.families.smollm3 import SmolLM3

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Llama("llama"),
        Mistral("mistral"),
        Qwen2("qwen2"),
        Qwen3("qwen3"),
        SmolLM3("smollm3"),
        Granite("granite"),
        SeedOss("seed_oss"),
    )
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a transformers config, also of that of a cut model. Raises `UnsupportedModel` with the remedy."""
    name = config.family if is_cut(config) else config.model_type
    if name not in FAMILIES:
        why = f" because {REASONS[name]}" if name in REASONS else ""
        raise UnsupportedModel(f"model family '{name}' is not supported{why}: use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
