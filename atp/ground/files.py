"""Atomic files and folders: written under a temporary name, flushed, and moved into place in one step.

Nothing is ever written through a link: a temporary name is random and new, and a file that grows in place must be a
regular one.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp.ground.errors import InputError, errno_of, reason, shorten

if TYPE_CHECKING:
    from torch import Tensor

HELD = (errno.EWOULDBLOCK, errno.EACCES)  # what `flock` says where another process holds the lock
_MARK = ".writing-"
_LONGEST = 255  # bytes of a name
_UNPLACED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # errors of `write`, which knows no name
_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@contextmanager
def whole_file(path: Path, ending: str | None = None) -> Iterator[Path]:
    """Yields a new empty file, which replaces `path` in one step if the block ends without an error.

    Several processes may do so at once: the last one wins. A link at `path` is replaced, and its target left alone.
    ending: of the temporary name; None: the name of `path`.
    """

    def make(temporary: Path) -> int:
        return os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)

    with placed(path), _temporary(path.parent, ending or path.name, make) as temporary:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    flush(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a new empty folder, which replaces `path` if the block ends without an error.

    `path` is always the old folder, the new one, or for an instant missing; never incomplete. Several processes and
    links are as for `whole_file`.
    """

    def make(temporary: Path) -> int:
        temporary.mkdir()
        return os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    path.parent.mkdir(parents=True, exist_ok=True)
    with placed(path), _temporary(path.parent, path.name, make) as temporary:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            if entry.is_file():  # safetensors lets only the owner read its files, whatever the umask
                entry.chmod(temporary.stat().st_mode & 0o666)
            flush(entry)
        _take_place(temporary, path)


def _take_place(temporary: Path, path: Path) -> None:
    """Moves a folder to `path` and removes what was there."""
    old = _unused(path.parent, path.name)
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            with contextlib.suppress(OSError):
                os.replace(old, path)
            raise
        _take_place(temporary, path)  # of a folder that another process has put there meanwhile
    flush(path.parent)
    _remove(old)


@contextmanager
def _temporary(folder: Path, ending: str, make: Callable[[Path], int]) -> Iterator[Path]:
    """What `make` makes under a name that was free, removed if it is still there at the end.

    make: makes it, must raise FileExistsError for a name in use, and returns a descriptor. The lock on it says that a
    process is writing, for `remove_leftovers`.
    """
    while True:
        temporary = _unused(folder, ending)
        handle = make(temporary)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if temporary.exists():  # else it was taken for a leftover before it was locked
            break
        os.close(handle)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # which would take the place of what went wrong
            _remove(temporary)
        os.close(handle)


def new_folder(parent: Path, ending: str) -> Path:
    """A new folder under a temporary name, which the next `remove_leftovers` removes."""
    folder = _unused(parent, ending)
    folder.mkdir(parents=True)
    return folder


def _unused(folder: Path, ending: str) -> Path:
    """A temporary name that nobody can know before, at most as long as names may be."""
    start = f"{_MARK}{secrets.token_hex(8)}-"
    while len(os.fsencode(start + ending)) > _LONGEST:
        ending = ending[1:]
    return folder / f"{start}{ending}"


@contextmanager
def placed(path: Path) -> Iterator[None]:
    """Lets an error of the disk name the file or folder that was to be written."""
    try:
        yield
    except Exception as error:
        number = errno_of(error)
        if number not in _UNPLACED:
            raise
        if isinstance(error, OSError):
            error.filename = str(path)
            raise
        raise OSError(number, reason(error), str(path)) from error


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file in a folder of ours, for what must keep its place there.

    flags: as for `os.open`. Raises `InputError` for a link, which may lead anywhere, a folder, a pipe or a device, on
    none of which it waits, and FileNotFoundError where there is nothing and `flags` do not make it.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError:
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise _not_ours(path) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _not_ours(path)
    return handle


def _not_ours(path: Path) -> InputError:
    return InputError(f"{shorten(path)} is a link or no file, so nothing is written to it: remove it and try again")


def append(path: Path, text: str) -> None:
    """Appends UTF-8 text to a file that only this process writes. Errors are those of `open_regular`."""
    with placed(path), open(path, "a", encoding="utf-8", opener=lambda _, flags: open_regular(path, flags)) as file:
        file.write(text)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, replacing an earlier file in one step. A crash leaves the old file or the new one."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, replacing an earlier file in one step."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with a line of all their keys above them; a row that lacks a key has an empty cell there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file of small tensors, replacing an earlier one in one step."""
    from safetensors.torch import save  # with torch, which takes seconds

    with whole_file(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in one of our files; None if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def remove_leftovers(folder: Path) -> None:
    """Removes half-written files and folders that a crash left anywhere under a folder of a run.

    What another process is writing there stays, as far as the file system has locks.
    """
    for leftover in list(folder.rglob(f"{_MARK}*")):
        if not any(parent.name.startswith(_MARK) for parent in leftover.relative_to(folder).parents):
            _remove_unless_held(leftover)


def remove_leftovers_of(path: Path) -> None:
    """Removes what a crash left of earlier tries to write `path`, where locks can tell it from what others write."""
    for leftover in list(path.parent.glob(f"{_MARK}*")):
        if leftover.name.endswith(f"-{path.name}"):
            _remove_unless_held(leftover, sure=True)


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


def _remove_unless_held(path: Path, *, sure: bool = False) -> None:
    """sure: leaves it where nobody can tell whether it is held, on a file system without locks."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        _remove(path)  # a link, or gone
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if sure or error.errno in HELD:
            return
        _remove(path)
    else:
        _remove(path)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
