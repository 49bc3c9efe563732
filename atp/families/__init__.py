"""The model families that can be pruned: one file per family, registered here."""

from atp.families.family import Family, Linear, UnsupportedModel, family_of

__all__ = ["Family", "Linear", "UnsupportedModel", "family_of"]
