"""What a comparison leaves for people: comparison.md, comparison.html and, with matplotlib, comparison.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atp.compare.table import markdown, remarks, table
from atp.files import write_text
from atp.report import markup, plots
from atp.report.page import html_page

_PANELS = {"relative_performance": "relative performance", "perplexity_ratio": "perplexity / dense"}


def write_pages(folder: Path, content: dict[str, Any]) -> None:
    """Writes the pages of the content of comparison.json, each in one step."""
    write_text(folder / "comparison.md", markdown(content))
    write_text(folder / "comparison.html", html_page(f"Comparison {folder.resolve().name}", _body(content)))
    panels = _panels(content)
    if panels and plots.available():
        plots.intervals_png(folder / "comparison.png", panels)


def _panels(content: dict[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """For each relative figure that there is: method -> (value, low, high)."""
    panels = {}
    for key, title in _PANELS.items():
        rows = {n: (r[key]["value"], *r[key]["interval"]) for n, r in content["methods"].items() if key in r}
        if rows:
            panels[title] = rows
    return panels


def _body(content: dict[str, Any]) -> str:
    head, rows = table(content)
    cells = [[markup.escape(cell) for cell in row] for row in rows]
    caption = "Against the tuned dense model; bars are 95 % intervals."
    return (
        markup.section(
            f"Methods at {content['target_keep']:.0%} of the decoder",
            markup.table(head, cells),
            *(markup.paragraph(remark) for remark in remarks(content)),
        )
        + markup.section("Kept of the tuned dense model", markup.figure(plots.intervals(_panels(content)), caption))
        + markup.section(
            "Settings",
            markup.definition([("command", content["command"])]),
            markup.details("Data", markup.definition(content["data"].items())),
            markup.details("Versions", markup.definition(content["versions"].items())),
        )
    )
