"""The examples of one source: a list, or a table in the cache where they are too large for one."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from atp.data import arrow, eviction, examples
from atp.data.chat import key_of
from atp.data.custom import Meaning, examples_of
from atp.data.examples import Example, Pool, Stored
from atp.data.files import open_source
from atp.ground import heap
from atp.ground.errors import InputError
from atp.ground.files import read_json, write_json
from atp_kernels._version import __version__

_FORMAT = 1  # of the tables; another number makes them anew


def read_source(
    source: str, meaning: Meaning, limit: int | None = None, skipped: list[str] | None = None, workers: int = 0
) -> Sequence[Example]:
    """The examples of a file, folder or Hub name, in order: a list up to `examples.LARGE` characters, else `Stored`.

    skipped: takes a sentence on each row that is left out; None: the first such row is an `InputError`. workers: as in
    `DataSettings`. Without package `datasets` all examples go into a list.
    """

    def bad(error: InputError) -> None:
        if skipped is None:
            raise InputError(f"{error}; or leave such rows out with data.on_error=skip") from error
        skipped.append(str(error))

    opened = open_source(source, limit, bad)
    found: list[Example] = []
    size, rest = 0, examples_of(opened.rows, meaning, bad)
    for example in rest:
        found.append(example)
        size += example.size
        if size > examples.LARGE and arrow.at_hand():
            key = _key(opened.identity(), meaning, limit, skipped is not None)
            pool = _pool(key, chain(found, rest), skipped, workers)
            found.clear()
            heap.give_back()
            return Stored([pool], np.arange(len(pool)))
    return found


def _pool(key: str, found: Iterable[Example], skipped: list[str] | None, workers: int) -> Pool:
    """The pool with this key, written now unless it is in the cache, with the sentences on rows that were left out."""
    cache, most = arrow.cache_folder(), eviction.most_bytes()
    folder = cache / key
    with arrow.told(folder), arrow.locked(folder):
        if (known := read_json(folder / arrow.COMPLETE)) is None:
            arrow.write(folder, map(_record, found), _schema())
            write_json(folder / arrow.COMPLETE, {"skipped": skipped or []})
        elif skipped is not None:
            skipped[:] = known["skipped"]
        use = eviction.Use(folder)
    eviction.trim(cache, most)
    return Pool(arrow.ArrowTable(arrow.parts_in(folder), use), key, workers=workers)


def _key(identity: str | None, meaning: Meaning, limit: int | None, skips: bool) -> str:
    """What the examples depend on, as a name of a folder; one of its own where that is not known."""
    chat = key_of(meaning.chat)
    if identity is None or chat is None:
        return uuid.uuid4().hex
    columns = sorted(meaning.columns.items())
    facts = [_FORMAT, __version__, identity, limit, skips, meaning.labels, meaning.label_names, columns, chat]
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _record(example: Example) -> tuple[int, dict[str, Any]]:
    return example.size, {name: getattr(example, name) for name in (*Pool.columns, "size")}


def _schema() -> Any:
    import pyarrow

    text = pyarrow.string()
    columns = dict.fromkeys(Pool.columns, text) | {"turns": pyarrow.list_(pyarrow.list_(pyarrow.int32()))}
    return pyarrow.schema([*columns.items(), ("size", pyarrow.int64())])
