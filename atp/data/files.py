"""Rows of a data source: a local file, a folder of files, or a data set of the Hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from atp.data.formats import FILES, SUFFIXES, read_file, suffix_of
from atp.data.hub import HubName
from atp.data.rows import Bad, Row, stop
from atp.ground.errors import InputError, reason, shorten
from atp.ground.reading import check_file, existing

# What `datasets` keeps beside the data that it saves.
_NO_DATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_HELD_OUT = re.compile(r"(?<![a-z])(test|valid|validation|val|dev|eval)(?![a-z])")


class Source(NamedTuple):
    """A data source that is being read.

    identity: text that is the same only for the same content, read from the files where they are local; None if there
    is none, as for a part of a data set of the Hub whose commit is not known.
    """

    rows: Iterator[Row]
    identity: Callable[[], str | None]


def read_rows(source: str, limit: int | None = None, bad: Bad = stop) -> list[Row]:
    """The rows of `open_source`, all at once."""
    return list(open_source(source, limit, bad).rows)


def open_source(source: str, limit: int | None = None, bad: Bad = stop) -> Source:
    """The rows of a file with one of `SUFFIXES`, a folder of these, or a Hub name
    `owner/name[@revision][#config][:split]`, read as they are asked for.

    A folder's files are read in the order of their names. limit: read only the first rows; sources are streamed, so no
    more are loaded. bad: takes the `InputError` of a row that cannot be read. Raises `InputError` for a missing, empty
    or malformed file, and for a Hub data set that cannot be loaded.
    """
    seen = False

    def note(error: InputError) -> None:
        nonlocal seen
        seen = True
        bad(error)

    def rows() -> Iterator[Row]:
        row = None
        for row in islice(opened.rows, limit):
            yield row
        if row is None and not seen:
            raise InputError(f"{shorten(source)} is empty: give a file with at least one row")

    opened = _open(source, limit, note)
    return Source(rows(), opened.identity)


def check_source(source: str) -> Path:
    """Raises `InputError` for a path where no file of a known type is; folders and Hub names pass. Returns the path."""
    try:
        path = Path(source).expanduser()
    except RuntimeError:
        raise InputError(f"{shorten(source)}: there is no such home folder; write out the path") from None
    if suffix_of(path) is not None:
        check_file(path, "", f"check the path, and give a {FILES}")
    elif (found := existing(source)) is not None and found.is_file():
        raise InputError(
            f"{shorten(source)}: unknown file type '{shorten(found.suffix, 20)}'; use one of {', '.join(SUFFIXES)}"
        )
    return path


def _open(source: str, limit: int | None, bad: Bad) -> Source:
    path = check_source(source)
    if suffix_of(path) is not None:
        return Source(read_file(path, bad), lambda: _content([path]))
    found = existing(source)
    if found is not None and found.is_dir() and (files := _files_in(found)):
        return Source(chain.from_iterable(read_file(file, bad) for file in files), lambda: _content(files))
    return _open_hub(source, limit)


def _content(files: Sequence[Path]) -> str:
    """Names and SHA-256 of files. Raises `InputError` for one that cannot be read any more."""
    found = []
    for path in files:
        try:
            with path.open("rb") as file:
                found.append(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
        except OSError as error:
            raise InputError(f"cannot read {shorten(path)} ({reason(error)}): check its permissions") from error
    return "\n".join(found)


def _files_in(folder: Path) -> list[Path]:
    """The data files in a folder, but not below it, by name. Raises `InputError` if they are of several splits."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read {shorten(folder)} ({shorten(error.strerror)}): check its permissions") from error
    files = [
        path
        for path in entries
        if suffix_of(path) and path.is_file() and path.name not in _NO_DATA and not path.name.startswith(".")
    ]
    held_out = [path for path in files if _HELD_OUT.search(path.name.lower())]
    if held_out and len(held_out) < len(files):
        raise InputError(
            f"{shorten(folder)} holds files of several splits, such as {shorten(held_out[0].name)}: give the files of "
            f"one split, or its name as {shorten(folder)}:train"
        )
    return files


def _open_hub(source: str, limit: int | None) -> Source:
    named, shown = HubName.parse(source), shorten(source)
    if not named.name:
        raise InputError(f"'{shown}' does not name a data set: give a {FILES} or a Hub name")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"'{shown}' needs package 'datasets': run pip install datasets, or give a file") from error

    def told(error: Exception) -> InputError:
        why = shorten(str(error).partition("\n")[0]) or type(error).__name__
        return InputError(
            f"cannot load '{shown}' ({why}): give a {FILES}, or a Hub name as owner/name@revision#config:split"
        )

    def rows() -> Iterator[Row]:
        try:
            for number, values in enumerate(records):
                yield Row(f"{shown}, row {number}", dict(values))
        except Exception as error:  # streamed records come through the network
            raise told(error) from error

    try:
        records = datasets.load_dataset(
            named.name, named.config or None, split=named.split or "train", streaming=limit is not None,
            revision=named.commit or named.revision or None,
        )  # fmt: skip
    except Exception as error:  # the network, the Hub and readers of all formats may raise anything
        raise told(error) from error
    # The names of the files that `datasets` has made of them hold a hash of what they were made of.
    made = None if limit is not None else sorted(file["filename"] for file in records.cache_files)
    return Source(rows(), lambda: f"{source} {named.commit or made}" if named.commit or made else None)
