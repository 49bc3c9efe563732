"""The results of a frontier: what its rows say at equal size, the table and the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atp.ground.errors import visible
from atp.ground.files import write_text
from atp.report import plots
from atp.report.beside import METRICS
from atp.report.terminal import with_interval
from atp.report.text import DASH, number, plain

Row = dict[str, Any]
"""One file of a model: the columns of frontier.csv."""
_BITS = "bits_per_byte"
_RULE = (
    "Equal MB: figures of the other model are interpolated linearly in MB between its files; beyond them they are "
    "those of its nearest file, whose MB is said."
)
_NOT_TIMED = "Speed was not measured, because llama.cpp is not installed: pip install xllamacpp, then repeat this."


def write_pages(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Writes frontier.md and, with matplotlib, frontier.png; returns what the rows say, one sentence each."""
    said = list(answers(rows))
    head, lines = table(rows)
    shown = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    text = ["# Size and quality", "", *(f"| {' | '.join(map(plain, line))} |" for line in shown), ""]
    write_text(folder / "frontier.md", visible("\n".join([*text, *(f"* {plain(line)}" for line in said), ""])))
    if plots.available():
        _draw(folder / "frontier.png", rows)
    return said


def scores_of(rows: Sequence[Row]) -> list[str]:
    """The columns that are scores, which have intervals."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if f"{name} low" in names and any(row.get(name) is not None for row in rows)]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(head, lines) of text cells, a line per file, with 95 % intervals in parentheses."""
    scores = scores_of(rows)
    head = ["model", "bits", "MB", "prefill, tokens/s ↑", "decode, tokens/s ↑"]
    head += [f"{_label(name)} {_better(name)}" for name in scores]
    return head, [_line(row, scores) for row in rows]


def answers(rows: Sequence[Row]) -> Iterator[str]:
    """Each cut model against the tuned dense one (else the original) and against each rival, and the rule for it."""
    models = {row["model"]: row["kind"] for row in rows}
    dense = [name for name, kind in models.items() if kind == "dense"]
    others = dense or [name for name, kind in models.items() if kind == "original"]
    others += [name for name, kind in models.items() if kind == "rival"]
    cuts = [name for name, kind in models.items() if kind == "cut"]
    for cut in cuts:
        for other in others:
            yield f"{cut} against {other} at equal MB: " + "; ".join(_compared(rows, cut, other)) + "."
    if cuts and others:
        yield _RULE
    if any(row.get("decode_tokens_per_second") is None for row in rows):
        yield _NOT_TIMED


def at_size(rows: Sequence[Row], megabytes: float, score: str) -> tuple[float, float | None] | None:
    """A score at a size: (value, None), or (that of the nearest file, its MB) beyond the files; None without any.

    rows: the files of one model.
    """
    points = sorted((row["megabytes"], row[score]) for row in rows if row.get(score) is not None)
    if not points:
        return None
    for (low, first), (high, second) in zip(points, points[1:], strict=False):
        if low <= megabytes <= high and low < high:
            return first + (second - first) * (megabytes - low) / (high - low), None
    size, value = min(points, key=lambda point: abs(point[0] - megabytes))
    return value, None if size == megabytes else size


def _compared(rows: Sequence[Row], cut: str, other: str) -> Iterator[str]:
    """A clause per file of the cut model, the smallest first."""
    theirs = [row for row in rows if row["model"] == other]
    for row in sorted((row for row in rows if row["model"] == cut), key=lambda row: row["megabytes"]):
        clauses, far = [], None
        for score in scores_of(rows):
            found = at_size(theirs, row["megabytes"], score)
            if found is not None and row.get(score) is not None:
                clauses.append(f"{_label(score)} {row[score]:.3f} against {found[0]:.3f}")
                far = found[1]
        nearest = "" if far is None else f" (at {far:,.1f} MB)"
        yield f"{row['megabytes']:,.1f} MB in {row['bits']} bits: {', '.join(clauses)}{nearest}"


def _line(row: Row, scores: Sequence[str]) -> list[str]:
    speeds = (row.get("prefill_tokens_per_second"), row.get("decode_tokens_per_second"))
    cells = [row["model"], str(row["bits"]), number(row["megabytes"], 1), *(number(speed, 1) for speed in speeds)]
    for name in scores:
        known = row.get(name) is not None
        cells.append(with_interval(row[name], [row[f"{name} low"], row[f"{name} high"]], 3) if known else DASH)
    return cells


def _label(score: str) -> str:
    if score == _BITS:
        return "bits per byte"
    task, _, metric = score.rpartition(" ")
    return f"{task} {METRICS.get(metric, metric)}"


def _better(score: str) -> str:
    return "↓" if score == _BITS else "↑"


def _draw(path: Path, rows: Sequence[Row]) -> None:
    """A panel per score over MB, a line per model, with the bits at each of its files."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    files = {name: sorted((r for r in rows if r["model"] == name), key=lambda r: r["megabytes"]) for name in models}
    panels = {
        f"{_label(score)} {_better(score)}": {
            name: [(row["megabytes"], row[score], row[f"{score} low"], row[f"{score} high"]) for row in own]
            for name, own in files.items()
            if all(row.get(score) is not None for row in own)
        }
        for score in scores_of(rows)
    }
    labels = {name: [str(row["bits"]) for row in own] for name, own in files.items()}
    if panels:
        plots.curves_png(path, panels, "MB on disk", "", labels=labels)
