"""Examples, and sequences of them: lists, or `Stored` where they are too large for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal, overload

import numpy as np

from atp.data.arrow import ArrowTable, Rows, at_once

LARGE = 2**26
"""Characters that a list of examples may hold; more of them are stored."""

Field = Literal["document", "label", "task", "origin"]


@dataclass(frozen=True)
class Example:
    """One piece of text: a prompt and its completion, or plain text with no completion.

    document: id of the source document (`document_id`); examples of one document stay in one split.
    label: the right answer when the completion is one of a fixed set.
    task: name of the `Task` that scores the completion; empty for text that is only trained on.
    passage: text of the source document alone, if the prompt holds more than that.
    turns: start and end, in characters of the prompt, of earlier answers that `loss_on` "assistant" learns too.
    origin: the source that it was read from, where several are weighted.
    """

    document: str
    prompt: str
    completion: str = ""
    label: str | None = None
    task: str = ""
    passage: str = ""
    turns: tuple[tuple[int, int], ...] = ()
    origin: str = ""

    @property
    def source(self) -> str:
        """Text of the source document."""
        return self.passage or self.text

    @property
    def text(self) -> str:
        """Prompt and completion as one string."""
        return self.prompt + self.completion

    @property
    def size(self) -> int:
        """Characters that it holds."""
        return len(self.prompt) + len(self.completion) + len(self.passage)


class Pool:
    """All examples of a large source, in Arrow files (`atp.data.cache` writes them).

    key: names the content. origin: that of each example. workers: processes that make further tables of it, 0 for none
    beside this one.
    """

    columns = ("document", "prompt", "completion", "label", "task", "passage", "turns")

    def __init__(self, table: ArrowTable, key: str, origin: str = "", workers: int = 0) -> None:
        self.table, self.key, self.origin, self.workers = table, key, origin, workers
        self._derived: dict[str, ArrowTable] = {}

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def documents(self) -> list[str]:
        """The document of each example."""
        return self.table.column("document")

    @cached_property
    def sizes(self) -> Rows:
        """The characters of each example."""
        return np.array(self.table.column("size"), np.int64)

    def values(self, field: Field) -> Sequence[Any]:
        """A field of all examples."""
        if field == "origin":
            return [self.origin] * len(self)
        return self.documents if field == "document" else self.table.column(field)

    def derived(self, name: str, function: Callable[..., Any], features: dict[str, Any]) -> ArrowTable:
        """A table with a row for each example, by `ArrowTable.map`; name: the same only for the same content."""
        if name not in self._derived:
            self._derived[name] = self.table.map(function, name, features, self.workers)
        return self._derived[name]

    def close(self) -> None:
        """Lets go of the memory that reading its tables took, until they are read again."""
        for table in (self.table, *self._derived.values()):
            table.close()

    def take(self, rows: Rows) -> list[Example]:
        """The examples with these numbers, in this order."""
        return [example_of(record, self.origin) for record in self.table.take(rows, self.columns).to_pylist()]


def example_of(record: dict[str, Any], origin: str = "") -> Example:
    """The example in a record of a pool's table."""
    turns = tuple((start, end) for start, end in record["turns"])
    return Example(**{name: record[name] for name in Pool.columns} | {"turns": turns, "origin": origin})


class Stored(Sequence[Example]):
    """Examples from pools and lists in any order; their texts are read when they are asked for."""

    def __init__(self, pools: Sequence[Pool | list[Example]], places: Rows) -> None:
        """places: int64 [examples], numbers of examples in the pools, counted through all of them."""
        self.pools, self.places = tuple(pools), places
        self.starts = np.cumsum([0, *map(len, self.pools)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return Stored(self.pools, self.places[index])
        return self._read(self.places[[index]])[0]

    def __iter__(self) -> Iterator[Example]:
        step = at_once(self.size, len(self))
        for start in range(0, len(self), step):
            yield from self._read(self.places[start : start + step])
        self.close()

    def close(self) -> None:
        """Lets go of the memory that reading texts took, until they are read again."""
        for pool in self.pools:
            if isinstance(pool, Pool):
                pool.close()

    def by_pool(self, places: Rows | None = None) -> Iterator[tuple[Pool | list[Example], Rows, Rows]]:
        """(pool, rows of it, where in `places` they stand) of every pool that has some. places: default all."""
        places = self.places if places is None else places
        pool_of = np.searchsorted(self.starts, places, side="right") - 1
        for index in np.unique(pool_of):
            where = np.flatnonzero(pool_of == index)
            yield self.pools[index], places[where] - self.starts[index], where

    def values(self, field: Field) -> list[Any]:
        """A field of all examples, in order."""
        found: list[Any] = [None] * len(self)
        for pool, rows, where in self.by_pool():
            known = pool.values(field) if isinstance(pool, Pool) else [getattr(example, field) for example in pool]
            for place, row in zip(where.tolist(), rows.tolist(), strict=True):
                found[place] = known[row]
        return found

    @property
    def size(self) -> int:
        """Characters of all examples."""
        return sum(
            int(pool.sizes[rows].sum()) if isinstance(pool, Pool) else sum(pool[row].size for row in rows)
            for pool, rows, _ in self.by_pool()
        )

    def _read(self, places: Rows) -> list[Example]:
        found: list[Any] = [None] * len(places)
        for pool, rows, where in self.by_pool(places):
            read = pool.take(rows) if isinstance(pool, Pool) else [pool[row] for row in rows]
            for place, example in zip(where.tolist(), read, strict=True):
                found[place] = example
        return found


def values(examples: Sequence[Example], field: Field) -> list[Any]:
    """A field of all examples, in order, without reading texts that are stored."""
    return examples.values(field) if isinstance(examples, Stored) else [getattr(e, field) for e in examples]


def chosen(examples: Sequence[Example], places: Iterable[int]) -> Sequence[Example]:
    """The examples at these places, in this order."""
    if isinstance(examples, Stored):
        return Stored(examples.pools, examples.places[np.fromiter(places, np.int64)])
    return [examples[place] for place in places]


def joined(*parts: Sequence[Example]) -> Sequence[Example]:
    """The examples of all parts, one part after another."""
    if not any(isinstance(part, Stored) for part in parts):
        return list(chain.from_iterable(parts))
    pools: list[Pool | list[Example]] = []
    places = []
    for part in parts:
        stored = part if isinstance(part, Stored) else Stored([list(part)], np.arange(len(part)))
        # A pool that is there already keeps its place, so that its tables are used once.
        index = {id(pool): number for number, pool in enumerate(pools)}
        starts = np.cumsum([0, *map(len, pools)])
        moved = np.empty_like(stored.places)
        for pool, rows, where in stored.by_pool():
            if id(pool) not in index:
                index[id(pool)] = len(pools)
                starts = np.append(starts, starts[-1] + len(pool))
                pools.append(pool)
            moved[where] = rows + starts[index[id(pool)]]
        places.append(moved)
    return Stored(pools, np.concatenate(places))


def settled(examples: Sequence[Example]) -> Sequence[Example]:
    """The examples as a list if one may hold them."""
    return list(examples) if isinstance(examples, Stored) and examples.size <= LARGE else examples


def with_origin(examples: Sequence[Example], origin: str) -> Sequence[Example]:
    """The examples of one source, which know that it is theirs."""
    if isinstance(examples, Stored):
        pools = [Pool(pool.table, pool.key, origin, pool.workers) for pool in examples.pools if isinstance(pool, Pool)]
        return Stored(pools, examples.places)
    return [replace(example, origin=origin) for example in examples]
