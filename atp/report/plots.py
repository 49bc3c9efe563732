"""Plots as inline SVG in the page's own colours and font, for light and dark, and as PNG files."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from atp.ground.files import whole_file

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders for the page's own colours, replaced in the finished SVG.
_INK, _GRID = "#010101", "#020202"
_SERIES = ("#030301", "#030302", "#030303", "#030304")
_PAGE_COLORS = {_INK: "currentColor", _GRID: "var(--line)"} | {
    color: f"var(--series-{index})" for index, color in enumerate(_SERIES, start=1)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _GRID,
    "xtick.color": _INK, "ytick.color": _INK, "grid.color": _GRID, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.major.size": 0, "ytick.major.size": 0,
    "legend.frameon": False, "lines.linewidth": 1.6, "axes.titlesize": 10, "axes.titlelocation": "left",
    "text.parse_math": False,  # a name may hold two dollars
}  # fmt: skip
_WIDTH = 5.4  # inches; small enough that the text stays readable on a phone

_LIGHT = {_INK: "#1d2126", _GRID: "#dfe2e5"}  # for standalone pictures
_LIGHT_SERIES = ("#2563b8", "#c2571a", "#2a8a4a", "#8a4fb0", "#6b7280", "#b03060")

Records = list[dict[str, Any]]
Point = tuple[float, float, float, float]
Panels = dict[str, dict[str, tuple[float, float, float]]]
"""Title of a panel -> name of a row -> (value, low, high)."""


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def losses(metrics: Records) -> str:
    """Training loss over steps, one colour per phase, with the decision loss during search."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for color, (phase, records) in zip(_SERIES, _by_phase(metrics), strict=False):
            steps, values = _points(records, "loss")
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=color, label=phase)
        steps, values = _points(metrics, "decision_loss")
        if steps:
            axes.plot(steps, _smooth(values), color=_SERIES[3], linestyle=":", label="decision loss")
        steps, values = _points(metrics, "validation_loss")
        if steps:
            axes.plot(steps, values, color=_INK, marker=".", linewidth=1, label="validation")
        _finish(axes, "cross-entropy (nats)")

    return _svg("losses", draw) if _points(metrics, "loss")[0] else ""


def kept_share(metrics: Records) -> str:
    """Share of the decoder parameters kept, against the scheduled target."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(*_points(metrics, "keep"), color=_SERIES[0], label="kept")
        axes.plot(*_points(metrics, "target_keep"), color=_SERIES[1], linestyle="--", label="target")
        _finish(axes, "share of decoder parameters")

    return _svg("kept", draw) if _points(metrics, "keep")[0] else ""


def changed_decisions(metrics: Records) -> str:
    """Share of the decisions that flipped from one decision step to the next."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        steps, values = _points(metrics, "changed")
        axes.fill_between(steps, [100 * value for value in values], color=_SERIES[2], alpha=0.35, linewidth=0)
        axes.plot(steps, [100 * value for value in values], color=_SERIES[2], linewidth=1)
        axes.set_ylim(bottom=0)
        _finish(axes, "decisions changed (%)")

    return _svg("changed", draw) if _points(metrics, "changed")[0] else ""


def lasso(metrics: Records) -> str:
    """Group lasso over the removed groups, on a log scale; the line ends at exact zeros."""
    steps, values = _points(metrics, "lasso")
    points = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), color=_SERIES[3])
        _log(axes, "y")
        _finish(axes, "group lasso")

    return _svg("lasso", draw) if points else ""


def widths(shares: dict[str, list[float]]) -> str:
    """Kept share by layer, one row of bars per structure; shares: structure name -> one value in [0, 1] per layer.

    A cross stands where nothing is left.
    """

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(shares), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (name, values), color in zip(rows, shares.items(), _SERIES * len(shares), strict=False):
            axes.bar(range(len(values)), [100 * value for value in values], color=color, width=0.8)
            gone = [layer for layer, value in enumerate(values) if value == 0]
            axes.plot(gone, [8] * len(gone), linestyle="", marker="x", markersize=4, color=color)
            axes.set_ylim(0, 100)
            axes.set_title(name)
            axes.grid(False, axis="x")
        rows[-1].set_xlabel("layer")
        rows[len(rows) // 2].set_ylabel("kept (%)")
        rows[-1].xaxis.get_major_locator().set_params(integer=True)

    return _svg("widths", draw, height=0.7 + 1.1 * len(shares)) if shares else ""


def against_size(points: dict[str, Point], floor: float | None, label: str) -> str:
    """A score of models over their size, with its intervals; floor: the majority label's, a line across.

    points: name of a model -> (megabytes, value, low, high).
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, (size, value, low, high)), color, marker in zip(points.items(), _SERIES, "s^oD", strict=False):
            axes.plot([size, size], [low, high], color=color, linewidth=3, alpha=0.4)
            axes.plot([size], [value], color=color, marker=marker, linestyle="", label=name)
        if floor is not None:
            axes.axhline(floor, color=_INK, linewidth=0.8, linestyle=":", label="majority label")
        axes.set_xlim(0, 1.1 * max(size for size, *_ in points.values()))
        if max(high for *_, high in points.values()) > 10 * min(low for _, _, low, _ in points.values()) > 0:
            _log(axes, "y")
        axes.set_xlabel("megabytes")
        axes.set_ylabel(label)
        figure.legend(loc="outside upper left", ncols=2)

    return _svg(label, draw) if points else ""


def intervals(panels: Panels) -> str:
    """Values with their intervals, one panel per metric, with the same rows in each."""
    return _svg("intervals", _intervals(panels, _SERIES[0]), _intervals_height(panels)) if panels else ""


def intervals_png(path: Path, panels: Panels) -> None:
    """The same picture as a PNG file on white; needs matplotlib."""
    _png(path, _intervals(panels, _LIGHT_SERIES[0]), _intervals_height(panels))


def curves_png(
    path: Path, panels: dict[str, dict[str, list[Point]]], x: str, y: str, *, labels: dict[str, list[str]] | None = None
) -> None:
    """Lines through (x, value, low, high) with a band from low to high, one panel per domain, on a log scale.

    panels: title of a panel -> name of a line -> its points in order. labels: name of a line -> a text at each of its
    points, on a linear scale.
    """

    def draw(figure: Figure) -> None:
        names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
        colors = dict(zip(names, _LIGHT_SERIES * len(names), strict=False))
        for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for name, points in lines.items():
                at, values, low, high = zip(*points, strict=True)
                axes.plot(at, values, color=colors[name], marker="o", markersize=3, label=name)
                axes.fill_between(at, low, high, color=colors[name], alpha=0.15, linewidth=0)
                for place, text in enumerate((labels or {}).get(name, ())):
                    axes.annotate(text, (at[place], values[place]), (3, 3), textcoords="offset points", fontsize=8)
            if labels is None:
                _log(axes, "y")
            axes.set_title(title)
            axes.set_xlabel(x)
        axes.figure.axes[0].set_ylabel(y)
        axes.legend()

    _png(path, draw, 3.4)


def decisions_png(path: Path, runs: dict[str, Records]) -> None:
    """How the decisions of each run moved: share of every layer's MLP channels kept over steps, and share that flipped.

    runs: title -> records of metrics.jsonl. Of the structures of a layer the last is shown, its MLP channels.
    """

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, len(runs), squeeze=False, sharex="col", height_ratios=(2, 1))
        for (above, below), (title, records) in zip(grid.T, runs.items(), strict=True):
            decided = [record for record in records if "kept_by_layer" in record]
            steps = [record["step"] for record in decided]
            shares = [[100 * share for share in [*record["kept_by_layer"].values()][-1]] for record in decided]
            layers = len(shares[0]) if shares else 0
            image = above.pcolormesh(steps, range(layers), list(zip(*shares, strict=True)), vmin=0, vmax=100)
            above.set_title(title)
            above.set_ylabel("layer")
            figure.colorbar(image, ax=above, label="MLP channels kept (%)")
            below.plot(steps, [100 * record["changed"] for record in decided], color=_LIGHT_SERIES[0])
            below.set_ylabel("flipped (%)")
            below.set_xlabel("step")

    _png(path, draw, 4.6)


def _png(path: Path, draw: Callable[[Figure], None], height: float) -> None:
    """The drawing as a PNG file on white, replaced in one step; needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {key: _LIGHT.get(value, value) if isinstance(value, str) else value for key, value in _STYLE.items()}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(1.6 * _WIDTH, height), dpi=150, layout="constrained")
        draw(figure)
        with whole_file(path) as fresh:
            figure.savefig(fresh)


def _intervals(panels: Panels, color: str) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        rows = list(dict.fromkeys(name for panel in panels.values() for name in panel))
        for axes, (title, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for place, name in enumerate(rows):
                if name in panel:
                    value, low, high = panel[name]
                    axes.plot([low, high], [place, place], color=color, linewidth=3, alpha=0.4)
                    axes.plot([value], [place], color=color, marker="o", linestyle="")
            if max(high for _, _, high in panel.values()) > 10 * min(low for _, low, _ in panel.values()) > 0:
                _log(axes, "x")
            axes.axvline(1.0, color=color, linewidth=0.8, linestyle=":")
            axes.set_yticks(range(len(rows)), rows if axes.get_subplotspec().is_first_col() else [""] * len(rows))
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_title(title)

    return draw


def _intervals_height(panels: Panels) -> float:
    return 0.8 + 0.35 * max(len(panel) for panel in panels.values())


def _points(records: Iterable[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of the records that have `key`."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]
    return [step for step, _ in found], [value for _, value in found]


def _by_phase(metrics: Records) -> list[tuple[str, Records]]:
    return [(phase, list(records)) for phase, records in groupby(metrics, key=lambda record: record["phase"])]


def _smooth(values: list[float], window: int = 10) -> list[float]:
    """Mean of the last `window` values at each point."""
    return [sum(part) / len(part) for part in (values[max(0, end - window) : end] for end in range(1, len(values) + 1))]


def _log(axes: Axes, which: Literal["x", "y"]) -> None:
    """Makes an axis logarithmic, with plain numbers: the default writes formulas, which `_STYLE` leaves as they are."""
    from matplotlib.ticker import LogFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter())


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _svg(name: str, draw: Callable[[Figure], None], height: float = 2.9) -> str:
    """The drawing as an `<svg>` element; empty without matplotlib. name makes element ids unique on a page."""
    if not available():
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """The bare `<svg>` element, sized and coloured by the page, without metadata or clashing ids."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    tag, rest = svg.split(">", maxsplit=1)
    tag = re.sub(r' (width|height)="[^"]*"', "", tag)
    svg = f"{tag}>" + re.sub(r'<g id="[^"]*"', "<g", rest)
    for color, page_color in _PAGE_COLORS.items():
        svg = svg.replace(color, page_color)
    return re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
