"""Which process of a run this is, by what its launcher says: for those who speak before torch is imported."""

from __future__ import annotations

import os


def count() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, 0 for the main one."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes, scores and prints."""
    return rank() == 0


def leave() -> None:
    """Goes on as the only process, for commands in which the others have nothing to do."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def run_id() -> str | None:
    """What torchrun's `--rdzv-id` says, which its restarts share; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return None if name in ("", "none") else name  # torchrun's default on several machines
