"""What a mutant is, and how the tables of this package write them down."""

from collections.abc import Mapping
from dataclasses import dataclass

Table = Mapping[tuple[str, str], tuple[tuple[str, str], ...]]
"""(file, pytest selection) -> pairs of a text of that file and what takes its place."""


@dataclass(frozen=True)
class Mutant:
    """One broken line: `old` becomes `new` in `file`, and the pytest selection `tests` must then fail."""

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old} -> {new}"

    @property
    def compiled(self) -> bool:
        """Whether the extension has to be built anew."""
        return self.file.startswith("csrc/")


def mutants_of(table: Table) -> tuple[Mutant, ...]:
    return tuple(Mutant(file, old, new, tests) for (file, tests), changes in table.items() for old, new in changes)
