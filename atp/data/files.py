"""Rows of a local JSONL, CSV or Parquet file, or of a Hub set, with errors that name file, line and column."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from atp.errors import InputError

SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One record and where it came from, e.g. `train.jsonl, line 3`."""

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """The string in a column; `InputError` if the column is missing or holds something else."""
        value = self.get(column)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: column '{column}' holds {value!r}, not text; make it a string")
        return value

    def texts(self, column: str, count: int | None = None) -> list[str]:
        """The list of strings in a column, `count` of them; `InputError` as for `text`."""
        value = self.get(column)
        wanted = "a list of texts" if count is None else f"a list of {count} texts"
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f"{self.where}: column '{column}' holds {value!r}, not {wanted}; correct the row")
        if count is not None and len(value) != count:
            raise InputError(f"{self.where}: column '{column}' holds {len(value)} texts, not {count}; correct the row")
        return value

    def get(self, column: str) -> Any:
        """Whatever a column holds; `a.b` is column b of the record in column a. `InputError` if it is missing."""
        values: Any = self.values
        for name in column.split("."):
            if not isinstance(values, dict) or name not in values:
                found = ", ".join(map(str, values)) if isinstance(values, dict) and values else "none"
                raise InputError(
                    f"{self.where}: column '{column}' is missing (found: {found}); rename or add the column"
                )
            values = values[name]
        return values


def read_rows(source: str, limit: int | None = None) -> list[Row]:
    """Rows of a data source: a `.jsonl`, `.csv` or `.parquet` file, or a Hub name `owner/name[#config][:split]`.

    limit: read the first rows only; files and Hub sets are streamed, so that no more than these are loaded.
    Raises `InputError` for a file that is missing, empty or malformed, and for a Hub set that cannot be loaded.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in SUFFIXES:
        rows = list(islice(_read_file(path), limit))
    elif path.is_file():
        raise InputError(f"{source}: unknown file type '{path.suffix}'; use one of {', '.join(SUFFIXES)}")
    else:
        rows = _read_hub(source, limit)
    if not rows:
        raise InputError(f"{source} is empty: give a file with at least one row")
    return rows


def parse_jsonl(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Parses one JSON object a line, skipping blank lines; name stands for the file in errors."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not valid JSON ({error.msg}); write one JSON object a line") from error
        if not isinstance(values, dict):
            raise InputError(f"{where}: a {type(values).__name__}, not an object; write one JSON object a line")
        yield Row(where, values)


def _read_file(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: check the path")
    if path.suffix.lower() == ".parquet":
        yield from _parse_parquet(path)
        return
    parse = parse_jsonl if path.suffix.lower() == ".jsonl" else _parse_csv
    try:
        # utf-8-sig also reads the byte-order mark that spreadsheet programs put in front.
        with path.open(encoding="utf-8-sig", newline="") as lines:
            yield from parse(lines, str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error


def _parse_csv(lines: Iterable[str], name: str) -> Iterator[Row]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for values in reader:
            where = f"{name}, line {reader.line_num}"
            if None in values or None in values.values():
                raise InputError(f"{where}: not {len(reader.fieldnames or ())} fields as in the header; quote the text")
            yield Row(where, values)
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: {error}; write the file as JSONL instead") from error


def _parse_parquet(path: Path) -> Iterator[Row]:
    # pyarrow comes with datasets.
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            records = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(batch_size=256))
            for number, values in enumerate(records):
                yield Row(f"{path}, row {number}", values)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file ({error}); write it anew") from error


def _read_hub(source: str, limit: int | None) -> list[Row]:
    name, _, split = source.partition(":")
    name, _, config = name.partition("#")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"'{source}' needs package 'datasets': run pip install datasets, or give a file") from error
    try:
        records = datasets.load_dataset(name, config or None, split=split or "train", streaming=limit is not None)
        rows = [Row(f"{source}, row {number}", dict(values)) for number, values in enumerate(islice(records, limit))]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"cannot load '{source}' ({reason}): give a {' or '.join(SUFFIXES)} file, "
            f"or a Hub name as owner/name#config:split"
        ) from error
    return rows
