"""Rows of local files: JSON Lines, JSON, CSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from atp.data.rows import Bad, Row, stop
from atp.errors import InputError, quote, reason, shorten
from atp.reading import parse_json
from atp.requirements import require

_LARGEST_CELL = 2**31 - 1  # characters: the largest limit that the csv module accepts on every platform
_ROWS_AT_ONCE = 256  # of a binary file


def suffix_of(path: Path) -> str | None:
    """The suffix that says how a file is read, without `.gz`; None for a file that cannot be read."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    found = next((suffix for suffix in (*_TEXT, *_BINARY) if plain.endswith(suffix)), None)
    return None if name != plain and found in _BINARY else found


def read_file(path: Path, bad: Bad = stop) -> Iterator[Row]:
    """The rows of a file that has one of `SUFFIXES`. bad: takes the errors of single rows.

    Raises `InputError` for a file that cannot be read at all.
    """
    name, suffix = shorten(path), suffix_of(path)
    if suffix in _BINARY:
        yield from _numbered(_BINARY[suffix], path, name)
        return
    try:
        # utf-8-sig skips the byte-order mark that spreadsheet programs write.
        open_text: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as lines:
            yield from _TEXT[suffix or ".jsonl"](lines, name, bad)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{name}: not a gzip file, or a damaged one ({reason(error)}); compress it again") from error
    except OSError as error:
        raise InputError(f"cannot read {name} ({shorten(error.strerror)}): check its permissions") from error


def parse_jsonl(lines: Iterable[str], name: str, bad: Bad = stop) -> Iterator[Row]:
    """Parses one JSON object per line, skipping blank lines. name: the file, for errors. bad: takes those of lines."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            values = parse_json(line)
        except ValueError as error:
            bad(InputError(f"{where}: not valid JSON ({error}); write one JSON object per line"))
            continue
        if isinstance(values, dict):
            yield Row(where, values)
        else:
            bad(InputError(f"{where}: a {type(values).__name__}, not an object; write one JSON object per line"))


def _parse_json(file: TextIO, name: str, bad: Bad) -> Iterator[Row]:
    """The objects of a list, or of the one list in an object; or JSON Lines, which many `.json` files hold."""
    text = file.read()
    try:
        content = parse_json(text)
    except ValueError as error:
        if not text.lstrip().startswith("{") or "\n{" not in text:
            raise InputError(f"{name}: not valid JSON ({error}); write a list of objects") from error
        yield from parse_jsonl(text.splitlines(), name, bad)
        return
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise InputError(f"{name}: an object with {len(lists)} lists, not with one; write a list of objects")
        content = lists[0]
    if not isinstance(content, list):
        raise InputError(f"{name}: {quote(content, 60)}, not a list; write a list of objects")
    for number, values in enumerate(content):
        if isinstance(values, dict):
            yield Row(f"{name}, row {number}", values)
        else:
            bad(InputError(f"{name}, row {number}: {quote(values, 60)}, not an object; write a list of objects"))


def _parse_csv(lines: Iterable[str], name: str, bad: Bad) -> Iterator[Row]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for values in _with_cells_of_any_size(reader):
            where, fields = f"{name}, line {reader.line_num}", len(reader.fieldnames or ())
            if None in values or None in values.values():
                bad(InputError(f"{where}: not {fields} fields as in the header; quote the text"))
            else:
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


def _numbered(read: Callable[[Path], Iterator[dict[str, Any]]], path: Path, name: str) -> Iterator[Row]:
    require("pyarrow")  # comes with datasets
    number, kind = 0, "a Parquet" if read is _parquet_records else "an Arrow"
    try:
        for number, values in enumerate(read(path)):
            yield Row(f"{name}, row {number}", values)
    except Exception as error:  # a damaged file may raise anything
        after = f", after row {number}" if number else ""
        why = f"{type(error).__name__}: {shorten(error)}"
        raise InputError(f"{name}: not {kind} file, or a damaged one{after} ({why}); rewrite it") from error


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE))


def _arrow_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of an Arrow IPC stream, as `datasets` writes it, or of an Arrow IPC file."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            batch.validate(full=True)  # else offsets of a damaged file are read from wherever they point
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()


_TEXT: dict[str, Callable[..., Iterator[Row]]] = {".jsonl": parse_jsonl, ".json": _parse_json, ".csv": _parse_csv}
_BINARY = {".parquet": _parquet_records, ".arrow": _arrow_records}
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), *_BINARY)
"""Of the files that can be read."""
FILES = ".jsonl, .json, .csv (each also .gz), .parquet or .arrow file"
"""The same in words."""
