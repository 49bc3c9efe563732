"""The readable results of a comparison: comparison.md, comparison.html and, with matplotlib, comparison.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from atp.ground.errors import visible
from atp.ground.files import write_text
from atp.report import plots
from atp.report.page import render
from atp.studies.compare.table import comparison_remarks, markdown, table

_PANELS = {"relative_performance": "relative performance", "perplexity_ratio": "perplexity / dense"}


def write_pages(folder: Path, content: dict[str, Any]) -> None:
    """Writes the pages from the content of comparison.json, each in one step."""
    write_text(folder / "comparison.md", visible(markdown(content)))
    write_text(folder / "comparison.html", _page(folder, content))
    panels = _panels(content)
    if panels and plots.available():
        plots.intervals_png(folder / "comparison.png", panels)


def _panels(content: dict[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """For each relative figure available: method -> (value, low, high)."""
    panels = {}
    for key, title in _PANELS.items():
        rows = {n: (r[key]["value"], *r[key]["interval"]) for n, r in content["methods"].items() if r.get(key)}
        if rows:
            panels[title] = rows
    return panels


def _page(folder: Path, content: dict[str, Any]) -> str:
    head, rows = table(content)
    return render(
        "comparison",
        title=f"Comparison {folder.resolve().name}",
        share=f"{content['target_keep']:.0%}",
        head=head,
        rows=rows,
        remarks=comparison_remarks(content),
        plot=Markup(plots.intervals(_panels(content))),
        command=content["command"],
        data=list(content["data"].items()),
        versions=list(content["versions"].items()),
    )
