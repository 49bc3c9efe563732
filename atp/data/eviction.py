"""How much the cache of large sources may hold: tables that no process uses leave it, the least recently used first."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path

from atp.data import arrow
from atp.ground.errors import InputError, shorten

VARIABLE = "ATP_DATA_CACHE_GB"
_DEFAULT = "50"


class Use:
    """Keeps a folder of tables in the cache as long as this object lives, and marks it as used now.

    The kernel ends it with the process, however that ends. On file systems without locks (some network ones) nothing is
    marked, and nothing is removed.
    """

    def __init__(self, folder: Path) -> None:
        """Call it while `arrow.locked(folder)` is held."""
        handle = os.open(folder, os.O_RDONLY)
        weakref.finalize(self, os.close, handle)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with suppress(OSError):  # of another user
            os.utime(folder)


def most_bytes() -> float:
    """What the cache may hold, by `ATP_DATA_CACHE_GB`. Raises `InputError` unless that is a number from 0 to inf."""
    text = os.environ.get(VARIABLE, "").strip() or _DEFAULT
    try:
        most = float(text)
    except ValueError:
        most = math.nan
    if not most >= 0:
        raise InputError(f"{VARIABLE}={shorten(text)} is no number of gigabytes: set it to 50, or to inf for no bound")
    return most * 1e9


def trim(cache: Path, most: float) -> None:
    """Removes tables that are not in use until the cache holds at most so many bytes; other processes may do so too."""
    sizes = {folder: _size(folder) for folder in cache.iterdir() if folder.is_dir()}
    held = sum(sizes.values())
    for folder in sorted(sizes, key=_used):
        if held <= most:
            return
        if _remove(folder):
            held -= sizes[folder]


def _remove(folder: Path) -> bool:
    """Removes a folder unless a process makes or uses tables in it."""
    from filelock import FileLock  # comes with datasets

    key = folder.name.rpartition("-")[2]  # of .writing-...-KEY, which a killed process left, too
    try:
        with FileLock(folder.with_name(f"{key}.lock"), timeout=0):
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # First what says that all tables are there, so that half a folder is never taken for a whole one.
                (folder / arrow.COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder)
            finally:
                os.close(handle)
    except OSError:  # a lock that somebody holds is one as well
        return False
    return True


def _used(folder: Path) -> float:
    """When a process last began to use a folder; 0 if it has gone."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # it has gone
            size += path.stat().st_size
    return size
