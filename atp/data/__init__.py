"""Data: recipes that give disjoint train, calibration and test examples, and packing into token windows."""

from atp.data.packing import PackedDataset, pack
from atp.data.recipes import DataSettings, load_recipe, read_examples
from atp.data.splits import Example, Splits

__all__ = ["DataSettings", "Example", "PackedDataset", "Splits", "load_recipe", "pack", "read_examples"]
