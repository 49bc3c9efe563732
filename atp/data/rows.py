"""A row of data, with errors that name file, line and column."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from atp.ground.errors import InputError, quote, shorten

Bad = Callable[[InputError], None]
"""Takes the error of a row that cannot be used: raises it, or returns, and the row is left out."""


def stop(error: InputError) -> None:
    """The `Bad` that ends the reading."""
    raise error


class BadRows:
    """Rows that cannot be used, by what is wrong with them: a `Bad` that leaves them out and counts them."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[str]] = defaultdict(list)
        """What is wrong, without the values that differ from row to row -> the sentence on each such row."""

    def __call__(self, error: InputError) -> None:
        where, _, why = str(error).partition(": ")
        kind = re.sub(r" holds .*, not ", " holds no ", why)
        kind = re.sub(r"^label '.*' is not", "a label that is not", kind)
        kind = re.sub(r"^neither column .*", "no column of a known name", kind)
        self.kinds[shorten(re.split(r" \(|;", kind)[0], 80)].append(f"{_in_short(where)}: {why}")

    def __len__(self) -> int:
        return sum(map(len, self.kinds.values()))

    @property
    def most(self) -> str:
        """The most frequent kind."""
        return max(self.kinds, key=lambda kind: len(self.kinds[kind]))

    def examples(self, count: int) -> list[str]:
        """So many sentences, of all kinds in turn, the most frequent kind first."""
        columns = sorted(self.kinds.values(), key=len, reverse=True)
        turns = (found[place] for place in range(count) for found in columns if place < len(found))
        return list(islice(turns, count))


def _in_short(where: str) -> str:
    """`FILE:7` for `FILE, line 7`, as editors and terminals open it."""
    return re.sub(r", line (\d+)$", r":\1", where)


@dataclass(frozen=True)
class Row:
    """One record and where it came from, e.g. `train.jsonl, line 3`.

    columns: our name of a column -> its name in the record, where it has another.
    """

    where: str
    values: dict[str, Any]
    columns: Mapping[str, str] = field(default_factory=dict)

    def name(self, column: str) -> str:
        """The name of a column in the record, for a message too."""
        return shorten(self.columns.get(column, column))

    def at(self, column: str) -> str:
        """Where a column is, for a message."""
        return f"{self.where}: column '{self.name(column)}'"

    def has(self, column: str) -> bool:
        """Whether the record has a column."""
        try:
            self.get(column)
        except InputError:
            return False
        return True

    def optional(self, column: str) -> str:
        """The string in a column; "" if there is none. `InputError` as for `text`."""
        return self.text(column) if self.has(column) and self.get(column) is not None else ""

    def text(self, column: str) -> str:
        """The string in a column; `InputError` if the column is missing or holds something else."""
        value = self.get(column)
        if not isinstance(value, str):
            raise InputError(f"{self.at(column)} holds {_quoted(value)}, not text; make it a string")
        return value

    def texts(self, column: str, count: int | None = None) -> list[str]:
        """The list of strings in a column, `count` of them; `InputError` as for `text`."""
        value = self.get(column)
        wanted = "a list of texts" if count is None else f"a list of {count} texts"
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f"{self.at(column)} holds {_quoted(value)}, not {wanted}; correct the row")
        if count is not None and len(value) != count:
            raise InputError(f"{self.at(column)} holds {len(value)} texts, not {count}; correct the row")
        return value

    def get(self, column: str) -> Any:
        """The value of a column; `a.b` is column b of the record in column a. `InputError` if it is missing."""
        values: Any = self.values
        for name in self.columns.get(column, column).split("."):
            if not isinstance(values, dict) or name not in values:
                raise InputError(f"{self.at(column)} is missing (found: {names(values)}); rename or add the column")
            values = values[name]
        return values


def names(values: Any) -> str:
    """The column names of a record, for a message; `none` if there are none."""
    return shorten(", ".join(map(shorten, islice(values, 50)))) if isinstance(values, dict) and values else "none"


def _quoted(value: object) -> str:
    """A value as JSON names it where Python has another word."""
    return "null" if value is None else quote(value)
