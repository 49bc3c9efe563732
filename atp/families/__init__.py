"""The model families that can be pruned: one file per family, registered in `table`."""

from atp.families.family import Family, Linear, UnsupportedModel, Windows, is_cut, layer_config
from atp.families.table import FAMILIES, family_of

__all__ = ["FAMILIES", "Family", "Linear", "UnsupportedModel", "Windows", "family_of", "is_cut", "layer_config"]
