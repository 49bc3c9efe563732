"""Rows of local files: JSON Lines, JSON, CSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, TextIO

from atp.data.rows import Bad, Row, stop
from atp.ground.errors import InputError, quote, reason, shorten
from atp.ground.reading import parse_json, parse_json_list
from atp.ground.requirements import require

_LARGEST_CELL = 2**31 - 1  # characters: the largest limit that the csv module accepts on every platform
_ROWS_AT_ONCE = 256  # of a binary file
# What a file may unpack to: text shrinks to a third or a tenth, seldom to a fiftieth; a column that repeats one long
# text shrinks more. Small files may always have so much.
_SMALL, _TEXT_RATIO, _TABLE_RATIO = 2**24, 100, 1000
_LONGEST_ROW = 2**24  # characters of a line: `[{},{},...]` takes 24 times as many bytes as Python objects
_ROWS_OF_SMALL = 100_000  # that a table may have, or as many as bytes
_DELIMITERS = (",", ";", "\t")  # spreadsheet programs write the others where a comma is in numbers
_NO_TEXT = re.compile("[\udc80-\udcff]")  # what stands for a byte that is not UTF-8


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
        with (
            _opened(path, name) as content,
            io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
        ):
            yield from _TEXT[suffix or ".jsonl"](text if suffix == ".json" else _lines(text, name), name, bad)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{name}: not a gzip file, or a damaged one ({reason(error)}); compress it again") from error
    except OSError as error:
        raise InputError(f"cannot read {name} ({shorten(error.strerror)}): check its permissions") from error


def _opened(path: Path, name: str) -> IO[bytes]:
    """The bytes of a file, those of a `.gz` file unpacked."""
    if not path.name.lower().endswith(".gz"):
        return path.open("rb")
    most = max(_SMALL, _TEXT_RATIO * path.stat().st_size)
    return io.BufferedReader(_Bounded(path, most, name))


class _Bounded(io.RawIOBase):
    """A gzip file unpacked, up to `most` bytes; then raises `InputError`."""

    def __init__(self, path: Path, most: int, name: str) -> None:
        self._packed, self._most, self._name = gzip.open(path, "rb"), most, name

    def readable(self) -> bool:
        """For io."""
        return True

    def readinto(self, buffer: Any) -> int:
        """For io."""
        count = self._packed.readinto(buffer)
        self._most -= count
        if self._most < 0:
            raise _too_much(self._name, _TEXT_RATIO)
        return count

    def close(self) -> None:
        """For io."""
        self._packed.close()
        super().close()


def _too_much(name: str, ratio: int) -> InputError:
    return InputError(
        f"{name}: unpacks to more than {ratio} times its size and {_SMALL >> 20} MiB, as no text does; if it is as it "
        "should be, unpack it and give the result as JSONL"
    )


def _lines(text: TextIO, name: str) -> Iterator[str]:
    """The lines of a text, each of which fits in memory."""
    number = 0
    while line := text.readline(_LONGEST_ROW + 1):
        number += 1
        if len(line) > _LONGEST_ROW:
            raise InputError(
                f"{name}, line {number}: longer than {_LONGEST_ROW:,} characters; write one document per line"
            )
        yield line


def _check_text(text: str, where: str) -> None:
    """Raises `InputError` for bytes that were not UTF-8."""
    if not text.isascii() and (found := _NO_TEXT.search(text)):
        byte = ord(found[0]) - 0xDC00
        raise InputError(f"{where}: not UTF-8 text (byte {byte:#x} after {quote(text[: found.start()][-20:])}); "
                         "convert the file to UTF-8")  # fmt: skip


def parse_jsonl(lines: Iterable[str], name: str, bad: Bad = stop) -> Iterator[Row]:
    """Parses one JSON object per line, skipping blank lines. name: the file, for errors. bad: takes those of lines."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            _check_text(line, where)
            values = parse_json(line)
        except InputError as error:
            bad(error)
            continue
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
    _check_text(text, name)
    if text.lstrip(" \t\r\n").startswith("["):
        yield from _listed(text, name, bad)
        return
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
    yield from _objects(content, name, bad)


def _objects(content: Iterable[Any], name: str, bad: Bad) -> Iterator[Row]:
    for number, values in enumerate(content):
        if isinstance(values, dict):
            yield Row(f"{name}, row {number}", values)
        else:
            bad(InputError(f"{name}, row {number}: {quote(values, 60)}, not an object; write a list of objects"))


def _listed(text: str, name: str, bad: Bad) -> Iterator[Row]:
    """The objects of a list, one at a time: as Python objects all of them may take 24 times the memory of the text."""
    try:
        yield from _objects(parse_json_list(text), name, bad)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{name}: not valid JSON ({error}); write a list of objects") from error


def _parse_csv(lines: Iterable[str], name: str, bad: Bad) -> Iterator[Row]:
    lines = iter(lines)
    header = next(lines, "")
    _check_text(header, f"{name}, line 1")
    delimiter = next((mark for mark in _DELIMITERS if mark in header), ",")
    reader = csv.DictReader(chain([header], lines), strict=True, delimiter=delimiter)
    try:
        for values in _with_cells_of_any_size(reader):
            where, fields = f"{name}, line {reader.line_num}", len(reader.fieldnames or ())
            try:
                if None in values or None in values.values():
                    raise InputError(f"{where}: not {fields} fields as in the header; quote the text")
                _check_text(" ".join(values.values()), where)
            except InputError as error:
                bad(error)
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
    except InputError:
        raise
    except Exception as error:  # a damaged file may raise anything
        after = f", after row {number}" if number else ""
        why = f"{type(error).__name__}: {shorten(error)}"
        raise InputError(f"{name}: not {kind} file, or a damaged one{after} ({why}); rewrite it") from error


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a Parquet file; its texts stay in dictionaries until it is known how much they come to."""
    from pyarrow.parquet import ParquetFile

    name, size = shorten(path), path.stat().st_size
    with ParquetFile(path) as file:
        texts = _checked(file, size, name)
    left = max(_SMALL, _TABLE_RATIO * size)
    with ParquetFile(path, read_dictionary=texts) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            left -= sum(map(_unfolded, batch.columns))
            if left < 0:
                raise _too_much(name, _TABLE_RATIO)
            yield from batch.to_pylist()


def _checked(file: Any, size: int, name: str) -> list[str]:
    """The columns of texts in a Parquet file. Raises `InputError` where its parts say that they are too large."""
    parts = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    if file.metadata.num_rows > max(_ROWS_OF_SMALL, size):
        raise InputError(f"{name}: {file.metadata.num_rows:,} rows in {size:,} bytes; write each document once")
    columns = range(file.metadata.num_columns)
    most = max((sum(part.column(column).num_values for part in parts) for column in columns), default=0)
    if max(most, sum(part.total_byte_size for part in parts)) > max(_SMALL, _TEXT_RATIO * size):
        raise _too_much(name, _TEXT_RATIO)
    found = [file.schema.column(column) for column in columns]
    return [
        column.path
        for column in found
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type in ("STRING", "JSON", "ENUM", "NONE")
    ]


def _unfolded(column: Any) -> int:
    """Bytes of a column's values where each stands for itself, and not as the number of one in a dictionary."""
    import pyarrow
    from pyarrow import compute, types

    kind = column.type
    if types.is_dictionary(kind):
        if kind.value_type not in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
            return column.nbytes
        return compute.sum(compute.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    if types.is_struct(kind):
        return sum(map(_unfolded, column.flatten()))
    if types.is_map(kind):
        return _unfolded(column.keys) + _unfolded(column.items)
    return _unfolded(column.flatten()) if types.is_nested(kind) else column.nbytes


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
