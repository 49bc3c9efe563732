"""The picture of an experiment; skipped without matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atp.report import plots
from atp.report.files import read_metrics
from atp.studies.compare.arms import ATP, Arm
from atp.studies.compare.results import ORIGINAL
from atp.studies.experiments.spec import ExperimentSpec

Domains = dict[str, dict[str, Any]]
"""Domain -> result of `atp.studies.compare.results.results`."""


def draw(
    path: Path, spec: ExperimentSpec, domains: Domains, arms: dict[str, Arm], runs: dict[str, dict[str, Path]]
) -> None:
    """Writes the experiment's picture from the runs finished so far. runs: domain -> label -> run folder."""
    if not plots.available():
        return
    if spec.picture == "decisions":
        records = {
            f"{domain}: {label}": read_metrics(folder)
            for domain, folders in runs.items()
            for label, folder in folders.items()
            if arms[label].method == ATP and (folder / "metrics.jsonl").is_file()
        }
        if records:
            plots.decisions_png(path, records)
    elif spec.picture == "curve" and spec.x is not None:
        curves = {domain: _lines(found, arms, spec.x) for domain, found in domains.items()}
        curves = {domain: lines for domain, lines in curves.items() if lines}
        if curves:
            plots.curves_png(path, curves, spec.x, "held-out perplexity")
    else:
        panels = {domain: _perplexities(found) for domain, found in domains.items() if len(found) > 1}
        if panels:
            plots.intervals_png(path, panels)


def _perplexities(found: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Perplexity of every arm relative to the tuned dense model, or absolute without such an arm."""
    key = "perplexity_ratio"
    if any(key in row for row in found.values()):
        return {label: _interval(row[key]) for label, row in found.items() if key in row and label != ORIGINAL}
    return {label: _interval(row["scores"]["perplexity"]) for label, row in found.items() if label != ORIGINAL}


def _lines(found: dict[str, Any], arms: dict[str, Arm], key: str) -> dict[str, list[plots.Point]]:
    """Method -> (x, perplexity, low, high): a curve over arms that vary the key, a flat line for the others."""
    lines: dict[str, list[plots.Point]] = {}
    for label, row in found.items():
        arm = arms.get(label)
        values = dict(override.split("=", 1) for override in arm.overrides) if arm else {}
        if arm is not None and key in values:
            lines.setdefault(arm.method, []).append((float(values[key]), *_interval(row["scores"]["perplexity"])))
    ends = [x for points in lines.values() for x, *_ in points]
    for label, row in found.items():
        if ends and (label not in arms or not arms[label].overrides):
            flat = _interval(row["scores"]["perplexity"])
            lines[label] = [(x, *flat) for x in (min(ends), max(ends))]
    return {name: sorted(points) for name, points in lines.items()}


def _interval(figure: dict[str, Any]) -> tuple[float, float, float]:
    return (figure["value"], *figure["interval"])
