"""One process at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atp.ground.errors import InputError, shorten
from atp.ground.files import HELD, open_regular

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def holder(folder: Path) -> str | None:
    """Which process holds the lock of a folder, as a few words; None if none does.

    Asks by taking a shared lock for a moment, in which nobody else could start a run there.
    """
    try:
        handle = open_regular(folder / LOCK, os.O_RDONLY)
    except (OSError, InputError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _named(handle) if error.errno in HELD else None
    finally:
        os.close(handle)
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder during a with block. Raises `InputError` naming the process that already holds it.

    Raises it too for a `.lock` that is a link or no regular file.

    The kernel releases it when the process ends, however it ends; a `.lock` file left behind means nothing by itself.
    On file systems without locks (some network ones) the block runs unlocked.
    """
    handle = open_regular(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise InputError(
                    f"{folder} is in use by {_named(handle)}: wait until that run ends, or choose another folder"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
        if os.fstat(handle).st_nlink == 1:  # else it is also another file, as after `cp -al`
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _named(handle: int) -> str:
    return shorten(os.read(handle, 200).decode(errors="replace")) or "another process"
