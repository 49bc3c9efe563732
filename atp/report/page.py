"""The page: sections in order, in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from atp.errors import shorten
from atp.files import write_text
from atp.report import sections
from atp.report.files import RunFiles, read_run
from atp.report.markup import escape
from atp.report.style import CSS

_SECTIONS = (
    sections.headline, sections.scores, sections.training, sections.widths, sections.certificate, sections.settings,
)  # fmt: skip


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run folder and returns its path; a run that stopped early gives a shorter page.

    The page is self-contained (inline style and SVG, no script) and replaces an earlier one in one step. Raises
    `InputError` when the folder holds no run.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    parts = [_drawn(part, run) for part in _SECTIONS]
    body = "".join([sections.notes(run), *parts])
    path = run_dir / "report.html"
    write_text(path, html_page(f"ATP run {run.name}", body))
    return path


def _drawn(part: Callable[[RunFiles], str], run: RunFiles) -> str:
    """A section, or a note in its place: one damaged record leaves the rest of the page."""
    try:
        return part(run)
    except Exception as error:  # a record that holds anything but what a run writes there
        reason = f"{type(error).__name__}: {shorten(error)}"
        run.notes.append(f"The section on {part.__name__} is left out: the run's records are damaged ({reason}).")
        return ""


def html_page(title: str, body: str) -> str:
    """A whole page around finished HTML; title is plain text."""
    title = escape(title)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head>"
        f"<body><main><h1>{title}</h1>{body}</main></body></html>\n"
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a name from the file system may hold what is no character
