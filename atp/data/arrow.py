"""Tables in Arrow files: written once, memory-mapped a little at a time, and mapped over by `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atp.ground.errors import InputError, reason, shorten
from atp.ground.files import remove_leftovers_of, whole_folder
from atp.ground.requirements import find

COMPLETE = "skipped.json"
"""The file beside tables that says that all of them are there; it lists what was left out."""
_FILE_BYTES = 2**27  # of text in one file
_ROWS_AT_ONCE = 1000  # in one batch of a file
_BYTES_AT_ONCE = 2**22
_READS = 4096  # rows after which a map is opened anew, since the pages that it has read count as resident memory

Rows = NDArray[np.int64]


def at_once(size: float, rows: int) -> int:
    """How many rows to handle together: up to 1000, and fewer where rows are long. size: of all `rows`, in bytes."""
    return max(1, min(_ROWS_AT_ONCE, int(_BYTES_AT_ONCE * rows / max(size, 1))))


def at_hand() -> bool:
    """Whether the packages that such tables need are installed; without them data stay in lists."""
    return find("datasets") is not None and find("pyarrow") is not None


def cache_folder() -> Path:
    """Where tables are kept between runs: `atp` in the cache of `datasets`."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "atp"


class ArrowTable:
    """Rows in Arrow files, in order."""

    def __init__(self, paths: Sequence[Path], use: object = None) -> None:
        """paths: one file or more. use: kept as long as the table and those made of it (`atp.data.eviction.Use`).

        Raises `InputError` for a file that is damaged.
        """
        self.paths, self.use = list(paths), use
        self._open: dict[int, Any] = {}
        self._reads = 0
        self._ends = np.cumsum([len(self._part(index)) for index in range(len(self.paths))], dtype=np.int64)
        self.close()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, rows: Rows, columns: Sequence[str]) -> Any:
        """The rows with these numbers, in this order, as a `pyarrow.Table`."""
        import pyarrow

        part_of = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(part_of, kind="stable")
        taken = []
        for part in np.unique(part_of):
            begin = self._ends[part - 1] if part else 0
            own = rows[part_of == part] - begin
            taken.append(self._part(part).with_format("arrow").select_columns(list(columns))[own.tolist()])
        self._reads += len(rows)
        if self._reads >= _READS:
            self.close()
        return pyarrow.concat_tables(taken).combine_chunks().take(np.argsort(order, kind="stable"))

    def column(self, name: str) -> list[Any]:
        """All values of a column, which must be small."""
        found: list[Any] = []
        for index in range(len(self.paths)):
            for batch in self._part(index).data.column(name).chunks:
                found += batch.to_pylist()
            self.close()
        return found

    def map(
        self, function: Callable[[dict[str, list[Any]]], Mapping[str, Any]], key: str, features: Mapping[str, Any],
        workers: int,
    ) -> ArrowTable:  # fmt: skip
        """A table of as many rows, made by `datasets` from batches of columns, and reused under this key.

        features: column -> `datasets` feature. workers: processes that make it, 0 for this one. Raises `InputError`
        where the disk is full.
        """
        import datasets

        made = []
        for index, path in enumerate(self.paths):
            target = path.with_name(f"{key}-{path.name}")
            part = self._part(index)
            with _quiet(), told(path.parent), locked(path.parent):
                rows = at_once(path.stat().st_size, len(part))
                mapped = part.map(
                    function, batched=True, batch_size=rows, writer_batch_size=rows, remove_columns=part.column_names,
                    features=datasets.Features(features), num_proc=workers or None, new_fingerprint=f"{key}{index:05d}",
                    cache_file_name=str(target), load_from_cache_file=True,
                )  # fmt: skip
            made += [Path(file["filename"]) for file in mapped.cache_files]
            del mapped, part
            self.close()
        return ArrowTable(made, self.use)

    def close(self) -> None:
        """Lets go of pages that were read, which count as resident memory; the table can be read on."""
        self._open.clear()
        self._reads = 0

    def _part(self, index: int) -> Any:
        import datasets

        if index not in self._open:
            path = self.paths[index]
            try:
                self._open[index] = datasets.Dataset.from_file(str(path))
            except Exception as error:  # a damaged file may raise anything
                raise InputError(
                    f"{shorten(path)} is damaged ({reason(error)}): delete the folder {shorten(path.parent)}, it is "
                    "made again"
                ) from error
        return self._open[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "use": None}


def values_of(table: Any, column: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The numbers of a column of lists: all of them in a row, and how many each list has."""
    lists = table.column(column).combine_chunks()
    if hasattr(lists, "chunks"):  # a chunked array with one chunk, or none
        lists = lists.chunk(0)
    return lists.flatten().to_numpy(zero_copy_only=False), np.diff(lists.offsets.to_numpy()).astype(np.int64)


def write(folder: Path, records: Iterable[tuple[int, Mapping[str, Any]]], schema: Any) -> None:
    """Writes records as Arrow files into a folder that appears when it is complete.

    records: (size in bytes, values by column).
    """
    import pyarrow

    remove_leftovers_of(folder)
    with whole_folder(folder) as made:
        size, writer = 0, None
        for index, (bytes_, batch) in enumerate(_batches(records)):
            if writer is None or size >= _FILE_BYTES:
                if writer is not None:
                    writer.close()
                size, writer = 0, pyarrow.ipc.new_stream(str(made / f"part-{index:06d}.arrow"), schema)
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
            size += bytes_
        if writer is not None:
            writer.close()


def parts_in(folder: Path) -> list[Path]:
    """The files that `write` made."""
    return sorted(folder.glob("part-*.arrow"))


def _batches(records: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    size, batch = 0, []
    for bytes_, record in records:
        size += bytes_
        batch.append(record)
        if len(batch) == _ROWS_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield size, batch
            size, batch = 0, []
    if batch:
        yield size, batch


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time makes tables in a folder; others wait, and find them. The folder need not exist."""
    from filelock import FileLock  # comes with datasets

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and notes of `datasets`: the command has its own."""
    import datasets

    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """A full or read-only disk becomes one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write the table of a large data source under {shorten(folder)} ({reason(error)}): make room, or "
            "set HF_DATASETS_CACHE to another place"
        ) from error
