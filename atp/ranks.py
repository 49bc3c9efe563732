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
