"""Pages from templates: HTML that needs no other file."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from atp.ground.errors import shorten, visible
from atp.ground.files import write_text
from atp.report import sections, words
from atp.report.files import RunFiles, read_run
from atp.report.picture import pictures

_SECTIONS: dict[str, Callable[[RunFiles], Any]] = {
    "opening": words.opening, "headline": sections.headline, "pictures": pictures, "usage": words.usage,
    "scores": sections.scores, "answers": sections.answers, "samples": sections.samples, "training": sections.training,
    "widths": sections.widths, "certificate": sections.certificate, "settings": sections.settings,
}  # fmt: skip


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run folder and returns its path; an unfinished run gives a shorter page.

    The page is self-contained (inline style and SVG, no script) and replaces an earlier one in one step. Raises
    `InputError` if the folder holds no run.
    """
    path = Path(run_dir) / "report.html"
    write_text(path, page_of(path.parent))
    return path


def page_of(run_dir: Path, *, reload_seconds: int | None = None) -> str:
    """The page of a run, in one text. reload_seconds: of a run under way, after which a browser asks for it anew.

    Raises `InputError` if the folder holds no run.
    """
    run = read_run(run_dir, under_way=reload_seconds is not None)
    content = {name: _found(name, part, run) for name, part in _SECTIONS.items()}
    title, notes = f"ATP run {run.name}", sections.notes(run)
    return render("run", title=title, notes=notes, glossary=words.GLOSSARY, reload_seconds=reload_seconds, **content)


def _found(name: str, part: Callable[[RunFiles], Any], run: RunFiles) -> Any:
    """The content of a section; None and a note if its records are damaged, so that the rest of the page remains."""
    try:
        return part(run)
    except Exception as error:  # a record may hold anything
        reason = f"{type(error).__name__}: {shorten(error)}"
        run.notes.append(f"The section on {name} is left out: the run's records are damaged ({reason}).")
        return None


def render(template: str, **values: Any) -> str:
    """A page from `templates/NAME.html.jinja2`. Values are escaped, unless they are `markupsafe.Markup`."""
    return visible(_environment().get_template(f"{template}.html.jinja2").render(values))


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("atp.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
