"""Reading rows from a local JSONL or CSV file, or from the Hub, with errors that name file, line and column."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp.errors import InputError

_SUFFIXES = (".jsonl", ".csv")


@dataclass(frozen=True)
class Row:
    """One record and where it came from, e.g. `train.jsonl, line 3`."""

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """The string in a column; `InputError` if the column is missing or holds something else."""
        if column not in self.values:
            raise InputError(
                f"{self.where}: column '{column}' is missing (found: {', '.join(map(str, self.values)) or 'none'}); "
                f"rename or add the column"
            )
        value = self.values[column]
        if not isinstance(value, str):
            raise InputError(f"{self.where}: column '{column}' holds {value!r}, not text; make it a string")
        return value


def read_rows(source: str) -> list[Row]:
    """Rows of a data source: a `.jsonl` or `.csv` file, or a Hub name `owner/name[#config][:split]`.

    Raises `InputError` for a file that is missing, empty or malformed, and for a Hub set that cannot be loaded.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in _SUFFIXES:
        rows = _read_file(path)
    elif path.is_file():
        raise InputError(f"{source}: unknown file type '{path.suffix}'; use one of {', '.join(_SUFFIXES)}")
    else:
        rows = _read_hub(source)
    if not rows:
        raise InputError(f"{source} is empty: give a file with at least one row")
    return rows


def parse_jsonl(lines: Iterable[str], name: str) -> list[Row]:
    """Parses one JSON object a line, skipping blank lines; name stands for the file in errors."""
    rows = []
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
        rows.append(Row(where, values))
    return rows


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: check the path")
    try:
        # utf-8-sig also reads the byte-order mark that spreadsheet programs put in front.
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return parse_jsonl(lines, str(path)) if path.suffix.lower() == ".jsonl" else _parse_csv(lines, path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error


def _parse_csv(lines: Iterable[str], path: Path) -> list[Row]:
    reader = csv.DictReader(lines, strict=True)
    rows = []
    try:
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if None in values or None in values.values():
                raise InputError(f"{where}: not {len(reader.fieldnames or ())} fields as in the header; quote the text")
            rows.append(Row(where, values))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; write the file as JSONL instead") from error
    return rows


def _read_hub(source: str) -> list[Row]:
    name, _, split = source.partition(":")
    name, _, config = name.partition("#")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"'{source}' needs package 'datasets': run pip install datasets, or give a file") from error
    try:
        records = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"cannot load '{source}' ({reason}): give a {' or '.join(_SUFFIXES)} file, "
            f"or a Hub name as owner/name#config:split"
        ) from error
    return [Row(f"{source}, row {number}", dict(values)) for number, values in enumerate(records)]
