"""Rows of a local JSONL, CSV or Parquet file, or of a Hub data set, with errors that name file, line and column."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from atp.errors import InputError, quote, shorten
from atp.reading import check_file, existing, parse_json
from atp.requirements import require

SUFFIXES = (".jsonl", ".csv", ".parquet")
_LARGEST_CELL = 2**31 - 1  # characters: the largest limit that the csv module accepts on every platform


@dataclass(frozen=True)
class Row:
    """One record and where it came from, e.g. `train.jsonl, line 3`."""

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """The string in a column; `InputError` if the column is missing or holds something else."""
        value = self.get(column)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: column '{column}' holds {quote(value)}, not text; make it a string")
        return value

    def texts(self, column: str, count: int | None = None) -> list[str]:
        """The list of strings in a column, `count` of them; `InputError` as for `text`."""
        value = self.get(column)
        wanted = "a list of texts" if count is None else f"a list of {count} texts"
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f"{self.where}: column '{column}' holds {quote(value)}, not {wanted}; correct the row")
        if count is not None and len(value) != count:
            raise InputError(f"{self.where}: column '{column}' holds {len(value)} texts, not {count}; correct the row")
        return value

    def get(self, column: str) -> Any:
        """The value of a column; `a.b` is column b of the record in column a. `InputError` if it is missing."""
        values: Any = self.values
        for name in column.split("."):
            if not isinstance(values, dict) or name not in values:
                raise InputError(
                    f"{self.where}: column '{column}' is missing (found: {names(values)}); rename or add the column"
                )
            values = values[name]
        return values


def names(values: Any) -> str:
    """The column names of a record, for a message; `none` if there are none."""
    return shorten(", ".join(map(shorten, islice(values, 50)))) if isinstance(values, dict) and values else "none"


def read_rows(source: str, limit: int | None = None) -> list[Row]:
    """Rows of a data source: a `.jsonl`, `.csv` or `.parquet` file, or a Hub name `owner/name[#config][:split]`.

    limit: read only the first rows; sources are streamed, so no more are loaded.
    Raises `InputError` for a missing, empty or malformed file, and for a Hub data set that cannot be loaded.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError:
        raise InputError(f"{shorten(source)}: there is no such home folder; write out the path") from None
    if path.suffix.lower() in SUFFIXES:
        check_file(path, "", f"check the path, and give a {' or '.join(SUFFIXES)} file")
        rows = list(islice(_read_file(path), limit))
    elif (found := existing(source)) is not None and found.is_file():
        suffix = shorten(path.suffix, 20)
        raise InputError(f"{shorten(source)}: unknown file type '{suffix}'; use one of {', '.join(SUFFIXES)}")
    else:
        rows = _read_hub(source, limit)
    if not rows:
        raise InputError(f"{shorten(source)} is empty: give a file with at least one row")
    return rows


def parse_jsonl(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Parses one JSON object per line, skipping blank lines. name: the file, for errors."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise InputError(f"{where}: not valid JSON ({error}); write one JSON object per line") from error
        if not isinstance(values, dict):
            raise InputError(f"{where}: a {type(values).__name__}, not an object; write one JSON object per line")
        yield Row(where, values)


def _read_file(path: Path) -> Iterator[Row]:
    name = shorten(path)
    if path.suffix.lower() == ".parquet":
        yield from _parse_parquet(path, name)
        return
    parse = parse_jsonl if path.suffix.lower() == ".jsonl" else _parse_csv
    try:
        # utf-8-sig skips the byte-order mark that spreadsheet programs write.
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from parse(lines, name)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {name} ({shorten(error.strerror)}): check its permissions") from error


def _parse_csv(lines: Iterable[str], name: str) -> Iterator[Row]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for values in _with_cells_of_any_size(reader):
            where = f"{name}, line {reader.line_num}"
            if None in values or None in values.values():
                raise InputError(f"{where}: not {len(reader.fieldnames or ())} fields as in the header; quote the text")
            yield Row(where, values)
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: {error}; write the file as JSONL instead") from error


def _with_cells_of_any_size(reader: csv.DictReader) -> Iterator[dict[str, Any]]:
    """The records of a reader without the csv module's limit of 131,072 characters per cell.

    The limit is global, so it is restored whenever other code runs.
    """
    while True:
        before = csv.field_size_limit(_LARGEST_CELL)
        try:
            values = next(reader, None)
        finally:
            csv.field_size_limit(before)
        if values is None:
            return
        yield values


def _parse_parquet(path: Path, name: str) -> Iterator[Row]:
    require("pyarrow")  # comes with datasets
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            records = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(batch_size=256))
            for number, values in enumerate(records):
                yield Row(f"{name}, row {number}", values)
    except Exception as error:  # a damaged file may raise anything
        after = f", after row {number}" if number else ""
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise InputError(f"{name}: not a Parquet file, or a damaged one{after} ({reason}); rewrite it") from error


def _read_hub(source: str, limit: int | None) -> list[Row]:
    name, _, split = source.partition(":")
    name, _, config = name.partition("#")
    shown = shorten(source)
    if not name:
        raise InputError(f"'{shown}' does not name a data set: give a {' or '.join(SUFFIXES)} file or a Hub name")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"'{shown}' needs package 'datasets': run pip install datasets, or give a file") from error
    try:
        records = datasets.load_dataset(name, config or None, split=split or "train", streaming=limit is not None)
        rows = [Row(f"{shown}, row {number}", dict(values)) for number, values in enumerate(islice(records, limit))]
    except Exception as error:  # the network, the Hub and readers of all formats may raise anything
        reason = shorten(str(error).partition("\n")[0]) or type(error).__name__
        raise InputError(
            f"cannot load '{shown}' ({reason}): give a {' or '.join(SUFFIXES)} file, "
            f"or a Hub name as owner/name#config:split"
        ) from error
    return rows
