"""The model families that can be pruned: one row each in `table`."""

from atp.families.experts import EXPERTS, Channels, ExpertFamily, Routed
from atp.families.family import (
    BLOCKS,
    SKIPPED,
    Block,
    Family,
    Linear,
    UnsupportedModel,
    Windows,
    cut_type,
    declared,
    family_name,
    is_cut,
    lacks,
    layer_config,
)
from atp.families.table import FAMILIES, family_of

__all__ = [
    "BLOCKS",
    "EXPERTS",
    "FAMILIES",
    "SKIPPED",
    "Block",
    "Channels",
    "ExpertFamily",
    "Family",
    "Linear",
    "Routed",
    "UnsupportedModel",
    "Windows",
    "cut_type",
    "declared",
    "family_name",
    "family_of",
    "is_cut",
    "lacks",
    "layer_config",
]
