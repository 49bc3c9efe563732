"""Numbers for people, and text quoted in Markdown."""

from __future__ import annotations

import math
import re

from atp.ground.errors import shorten

DASH = "–"


def code(text: object, limit: int = 500) -> str:
    """Markdown that shows a text as code on one line: no backtick ends it, and no HTML in it counts."""
    line = shorten(text, limit)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    # Spaces separate a backtick at an end from the fence; Markdown strips them.
    return f"{fence} {line} {fence}" if len(fence) > 1 or not line else f"{fence}{line}{fence}"


def plain(text: object, limit: int = 2000) -> str:
    """Markdown that shows a text literally, on one line: characters with a meaning in Markdown are escaped."""
    # An underscore inside a word has no meaning; `- `, `+ ` and `1. ` have one at the start of a line.
    text = re.sub(r"([\\`*\[\]<>&|#~$]|(?<!\w)_|_(?!\w))", r"\\\1", shorten(text, limit))
    return re.sub(r"^(\d*)([-+.)])(?=\s|$)", r"\1\\\2", text)


def number(value: object, digits: int = 2) -> str:
    """A number with `digits` decimals and thin-space thousands; tiny ones in scientific notation, None as a dash."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return DASH if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if value == 0:
        return "0"
    if abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}".replace(",", "\u202f")
