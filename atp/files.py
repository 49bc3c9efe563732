"""Atomic files and folders: written under a temporary name, flushed, and moved into place in one step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from atp.errors import InputError, reason, shorten

_MARK = ".writing-"


@contextmanager
def whole_file(path: Path, name: str | None = None) -> Iterator[Path]:
    """Yields a temporary path, which replaces `path` in one step if the block ends without an error.

    name: what the temporary name ends in; None: the name of `path`, which only one process at a time may write then.
    """
    temporary = path.with_name(f"{_MARK}{name or path.name}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder, which replaces `path` if the block ends without an error.

    `path` is always the old folder, the new one, or for an instant missing; never incomplete.
    """
    temporary, old = path.with_name(f"{_MARK}{path.name}"), path.with_name(f"{_MARK}old-{path.name}")
    try:
        for folder in (temporary, old):
            _remove(folder)
        temporary.mkdir(parents=True)
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            if entry.is_file():  # safetensors lets only the owner read its files, whatever the umask
                entry.chmod(temporary.stat().st_mode & 0o666)
            flush(entry)
        if path.exists() or path.is_symlink():
            os.replace(path, old)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(path.parent)
    _remove(old)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, replacing an earlier file in one step. A crash leaves the old file or the new one."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, replacing an earlier file in one step."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, replacing an earlier one in one step."""
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in one of our files; None if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def remove_leftovers(folder: Path) -> None:
    """Removes half-written files and folders that a crash left anywhere under a folder."""
    for leftover in list(folder.rglob(f"{_MARK}*")):
        _remove(leftover)


def check_writable(folder: Path, what: str) -> None:
    """Raises `InputError` if no file can be created in a folder. Leaves nothing behind.

    folder: need not exist yet. what: the setting that names it.
    """
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or reason(error)
        place = shorten(str(folder).replace("\0", "\\0"))
        raise InputError(f"{what} {place} is not writable ({why}): choose another place") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError, ValueError):
                path.rmdir()


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
