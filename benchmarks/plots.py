"""A picture of each operation from its CSV file: how many times as fast as its base every variant is."""

import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.case import Op
from benchmarks.records import read

_ASKED = ("device", "threads", "model", "part", "tokens", "rank", "dtype", "keep", "pass")


def plot(ops: Iterable[Op], folder: Path) -> list[Path]:
    """Writes OP.png beside OP.csv for every operation that has rows; the newest row of a case and variant counts.

    Exits with one sentence where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        sys.exit("Plots need matplotlib: pip install matplotlib.")
    written = []
    for op in ops:
        newest = {}
        for row in read(folder / f"{op.name}.csv"):
            if row["speedup"] and row["pass"] == op.passes[-1]:
                newest[tuple(row[name] for name in _ASKED), row["variant"]] = float(row["speedup"])
        if not newest:
            continue
        where = list(dict.fromkeys(case for case, _ in newest))
        variants = list(dict.fromkeys(variant for _, variant in newest))
        height, width = 1 + 0.25 * len(where) * len(variants), 0.8 / len(variants)
        figure = Figure(figsize=(9, max(height, 3)), layout="constrained")
        axes = figure.subplots()
        for index, variant in enumerate(variants):
            values = [newest.get((case, variant), 0.0) for case in where]
            places = [place + index * width for place in range(len(where))]
            bars = axes.barh(places, values, height=width, label=variant)
            axes.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], padding=2, fontsize=7)
        axes.set_yticks([place + 0.4 for place in range(len(where))], [_label(case) for case in where], fontsize=7)
        axes.invert_yaxis()
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set_xlabel(f"times as fast as {op.base} (p50)")
        axes.set_title(f"{op.name}, {op.passes[-1]}")
        axes.legend(fontsize=7)
        written.append(folder / f"{op.name}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def _label(case: tuple[str, ...]) -> str:
    device, threads, model, part, tokens, rank, dtype, keep, _ = case
    return f"{model} {part}\n{dtype} r{rank} M {tokens} keep {keep}\n{device}, {threads} threads"
