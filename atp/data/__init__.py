"""Data: recipes that give disjoint train, calibration and test examples, and packing into token windows."""

from atp.data.batches import collate
from atp.data.chat import chat_of
from atp.data.custom import read_examples, tasks_of
from atp.data.packing import PackedDataset, RaggedDataset, pack, unpacked
from atp.data.recipes import load_recipe
from atp.data.settings import DataSettings
from atp.data.splits import Example, Splits
from atp.data.tasks import Task

__all__ = [
    "DataSettings",
    "Example",
    "PackedDataset",
    "RaggedDataset",
    "Splits",
    "Task",
    "chat_of",
    "collate",
    "load_recipe",
    "pack",
    "read_examples",
    "tasks_of",
    "unpacked",
]
