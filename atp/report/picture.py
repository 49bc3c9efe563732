"""Quality against size: a picture for each score, with the original, the tuned dense and the final model."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from atp.report import beside, plots
from atp.report.beside import METRICS, megabytes
from atp.report.files import RunFiles
from atp.report.sections import with_interval
from atp.report.text import number


def pictures(run: RunFiles) -> list[dict[str, Any]]:
    """{svg, caption, told} of each score that the original and the final model both have; none without matplotlib.

    told: what the picture shows, in words.
    """
    summary, columns = run.summary, beside.columns(run.summary)
    found = []
    for task in summary.get("tasks", ()):
        scored = {name: column["tasks"].get(task, {}) for name, column in columns.items()}
        metric = beside.main_metric(summary, task)
        found.append(_picture(summary, f"{task} {METRICS[metric]}", "higher", scored, metric, 3))
    found.append(_picture(summary, beside.perplexity_label(summary), "lower", columns, "perplexity", 2))
    return [picture for picture in found if picture.get("svg")]


def _picture(
    summary: dict[str, Any], label: str, better: str, scored: dict[str, dict[str, Any]], metric: str, digits: int
) -> dict[str, Any]:
    """The picture of one score; empty if the original or the final model has no finite one, or no size."""
    names = beside.MODELS | beside.OTHERS
    points: dict[str, plots.Point] = {}
    told = []
    for name, scores in scored.items():
        value, bounds, size = scores.get(metric), scores.get(f"{metric}_interval"), megabytes(summary, name)
        if size is None or value is None or not math.isfinite(value):
            continue
        if bounds and not all(map(math.isfinite, bounds)):
            bounds = None
        points[names[name]] = (size, value, *(bounds or (value, value)))
        told.append(f"{names[name]} {with_interval(value, bounds, digits)} at {number(size, 0)} MB")
    if not {names["original"], names["final"]} <= points.keys():
        return {}
    measured = any(low < high for *_, low, high in points.values())
    floor = scored.get("majority", {}).get(metric)
    if floor is not None:
        told.append(f"{names['majority']} {number(floor, digits)}")
    return {
        "svg": Markup(plots.against_size(points, floor, label)),
        "caption": f"Size and {label}: {better} is better{'; bars are 95 % intervals' if measured else ''}.",
        "told": f"{label} and size: {'; '.join(told)}.",
    }
