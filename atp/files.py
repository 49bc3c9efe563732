"""Files that are whole or not there: written beside their place, flushed, and moved in one step."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from atp.errors import InputError, reason, shorten


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, replacing an earlier file in one step. A crash leaves the old file or the new one."""
    temporary = path.with_name(f".writing-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, replacing an earlier file in one step."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def check_writable(folder: Path, what: str) -> None:
    """Refuses a folder that no file can be made in, before work is done for it. Leaves nothing behind.

    folder: need not exist yet. what: the setting that names it. Raises `InputError`.
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
        raise InputError(f"{what} {place} cannot be written into ({why}): choose another place") from error
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
