"""The table of `mutations.py`: lines that apply a mask, a scaling, a bias or a norm, and each of them broken.

Tables of Python lie in the rooms of `atp_kernels`, those of C++ here. Every old text occurs exactly once in its file: a
changed line needs its entry changed too, and `test_mutations.py` says which. The loops that C++ compiles once per
instruction set are broken in the header that all sets share. The CUDA sources have no entries: their mutants could be
tested on a GPU alone.
"""

import runpy
from pathlib import Path

from mutants import native_groups, native_linear, native_rows
from mutants.mutant import Mutant, mutants_of

__all__ = ["MUTANTS", "Mutant"]

_ROOMS = Path(__file__).parents[2] / "atp_kernels"
_TABLES = (native_groups, native_linear, native_rows)
# By path, because importing a room imports the kernels, and each mutant is tested on a copy of them.
_ROOM_TABLES = [runpy.run_path(str(path))["TABLE"] for path in sorted(_ROOMS.glob("*/mutants.py"))]
MUTANTS = tuple(
    mutant for table in (*(module.TABLE for module in _TABLES), *_ROOM_TABLES) for mutant in mutants_of(table)
)
