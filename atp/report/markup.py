"""Small pieces of HTML and Markdown. Everything that is not markup passes through `escape`, `code` or `plain` here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape

from atp.errors import shorten

__all__ = [
    "card", "code", "definition", "details", "escape", "figure", "number", "paragraph", "plain", "section", "table",
]  # fmt: skip

DASH = "–"


def code(text: object, limit: int = 500) -> str:
    """Markdown that shows a text as code, on one line, whatever it holds: no backtick ends it, no HTML counts in it."""
    line = shorten(text, limit)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    # Spaces part a backtick at an end from the fence, and Markdown takes them off again.
    return f"{fence} {line} {fence}" if len(fence) > 1 or not line else f"{fence}{line}{fence}"


def plain(text: object, limit: int = 2000) -> str:
    """Markdown that shows a text as it is, on one line: characters that would mark it up are escaped."""
    # An underscore inside a word marks nothing up; `- `, `+ ` and `1. ` do at the beginning.
    text = re.sub(r"([\\`*\[\]<>&|#~$]|(?<!\w)_|_(?!\w))", r"\\\1", shorten(text, limit))
    return re.sub(r"^(\d*)([-+.)])(?=\s|$)", r"\1\\\2", text)


def number(value: object, digits: int = 2) -> str:
    """A number for people: thousands parted by spaces, `digits` decimals, tiny ones in powers; a dash for nothing."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return DASH if value is None else escape(str(value))
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if value == 0:
        return "0"
    if abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def section(title: str, *parts: str) -> str:
    """A titled section, or nothing when all its parts are empty."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph of plain text; kind is a CSS class."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the row; cells are finished HTML, heads are plain text."""
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    if not body:
        return ""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def definition(pairs: Iterable[tuple[str, object]]) -> str:
    """A list of names and values, all plain text."""
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in pairs)
    return f"<dl>{body}</dl>" if body else ""


def details(title: str, body: str) -> str:
    """A part that opens on a click; body is finished HTML."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def card(label: str, value: str, note: str = "", kind: str = "") -> str:
    """One headline figure; value is finished HTML, the rest plain text."""
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="card {kind}"><span>{escape(label)}</span><strong>{value}</strong>{small}</div>'


def figure(svg: str, caption: str) -> str:
    """A plot with its caption, or nothing without a plot."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" if svg else ""
