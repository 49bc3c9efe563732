"""Data: recipes that give disjoint train, calibration and test examples, and packing into token windows."""

from typing import TYPE_CHECKING

from atp.ground.lazy import lazily

if TYPE_CHECKING:
    from atp.data.batches import collate, scored_per_sample
    from atp.data.chat import chat_of
    from atp.data.custom import read_examples, tasks_of
    from atp.data.examples import Example
    from atp.data.packing import PackedDataset, RaggedDataset, fitted, pack, unpacked
    from atp.data.recipes import load_recipe
    from atp.data.settings import DataSettings
    from atp.data.splits import Splits
    from atp.data.tasks import Task
    from atp.data.tokens import Pieces

__all__ = [
    "DataSettings", "Example", "PackedDataset", "Pieces", "RaggedDataset", "Splits", "Task", "chat_of", "collate",
    "fitted", "load_recipe", "pack", "read_examples", "scored_per_sample", "tasks_of", "unpacked",
]  # fmt: skip
__getattr__ = lazily(
    __name__, batches="collate scored_per_sample", chat="chat_of", custom="read_examples tasks_of", examples="Example",
    packing="PackedDataset RaggedDataset fitted pack unpacked", recipes="load_recipe", settings="DataSettings",
    splits="Splits", tasks="Task", tokens="Pieces",
)  # fmt: skip
