"""The table of `mutations.py`: lines that apply a mask, a scaling, a bias or a norm, and each of them broken.

Every old text occurs exactly once in its file. A changed kernel line needs its entry changed too: `test_mutations.py`
says which. The loops that C++ compiles once per instruction set are broken in the header that all sets share. The CUDA
sources have no entries: their mutants could be tested on a GPU alone.
"""

from mutants import blocks, groups, kept, linear, linear_triton, native_groups, native_linear, native_rows, rows
from mutants.mutant import Mutant, mutants_of

__all__ = ["MUTANTS", "Mutant"]

_TABLES = (linear, blocks, kept, groups, linear_triton, native_groups, native_linear, native_rows, rows)
MUTANTS = tuple(mutant for module in _TABLES for mutant in mutants_of(module.TABLE))
