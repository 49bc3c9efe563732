"""A finished run on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from atp.ground.errors import visible
from atp.removal.certify import failure
from atp.report.beside import (
    MODELS,
    NOT_MEASURABLE,
    OTHERS,
    answers,
    columns,
    megabytes,
    parameters,
    result_remarks,
    scores_of_text,
)


def show(summary: dict[str, Any], console: Console) -> None:
    """Prints the table of a finished run, and what its models answer to one question if the config asks for it."""
    shown = columns(summary)
    names = {name: name.replace("_", " ") for name in MODELS} | OTHERS
    table = Table("", *(names[name] for name in shown), title="Result")
    for task in summary["tasks"]:
        scores = [column["tasks"].get(task, {}) for column in shown.values()]
        for metric in (name for name in scores[0] if f"{name}_interval" in scores[0]):
            cells = (with_interval(s.get(metric), s.get(f"{metric}_interval"), digits=3) for s in scores)
            table.add_row(f"{task} {metric}", *cells)
    if "relative_performance" in summary:
        mean, interval = summary["relative_performance"], summary["relative_performance_interval"]
        kept = NOT_MEASURABLE if mean is None else with_interval(mean, interval, digits=3)
        table.add_row("of tuned dense", *(kept if m == "final" else "" for m in shown))
    for key, label, digits in scores_of_text(summary):
        cells = (with_interval(c.get(key), c.get(f"{key}_interval"), digits) for c in shown.values())
        table.add_row(label, *cells)
    models = [name for name in shown if name != "majority"]
    table.add_row("parameters", *(f"{parameters(summary, m):,}" for m in models))
    keep = {"final": summary["keep_decoder"]}
    table.add_row("share of the decoder", *(f"{keep.get(m, 1.0):.3f}" for m in models))
    table.add_row("megabytes", *(f"{megabytes(summary, m):.0f}" for m in models))
    for what in ("prefill", "decode"):
        rate, speeds = f"{what}_tokens_per_second", [summary["speed"].get(m, {}) for m in models]
        digits = 0 if any(s.get(rate, 0) >= 100 for s in speeds) else 1
        row = (with_interval(s.get(rate), s.get(f"{rate}_interval"), digits) for s in speeds)
        table.add_row(f"{what} tokens/s", *row)
    console.print(table)
    for remark in result_remarks(summary):
        console.print(remark)
    rates = ", ".join(f"{k.replace('_', ' ')} {v:,.0f}" for k, v in summary["train_tokens_per_second"].items())
    console.print(f"training tokens/s: {rates}")
    broken = failure(summary["certificate"])
    console.print(f"certificate: {'pass' if broken is None else f'FAIL: {broken}'}")
    pairs = answers(summary)
    if pairs:
        console.print(f"\n{summary['answers']['chosen']}")
    for who, said in pairs:
        console.print(Text.assemble((f"{who}:", "bold"), f" {visible(said)}"))


def with_interval(value: float | None, interval: list[float] | None, digits: int) -> str:
    """`value (low to high)`, as far as they are known."""
    if value is None or interval is None:
        return "" if value is None else f"{value:,.{digits}f}"
    low, high = interval
    return f"{value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
