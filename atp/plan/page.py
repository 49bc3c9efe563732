"""The plan for a terminal: a few tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from atp.ground.errors import shorten
from atp.plan.data import refused
from atp.plan.parameters import PARTS

_MARKS = ("⟦", "⟧")  # around tokens with a loss, for terminals without colour


def page(plan: dict[str, Any]) -> Iterator[RenderableType]:
    """What `atp plan` prints, from the dictionary of `make_plan`, section by section."""
    model, decisions = plan["model"], plan["decisions"]
    count = model["processes"]
    several = f" in {count} processes" if count > 1 else ""
    rounds = f", cut in {decisions['rounds']} rounds" if decisions["rounds"] > 1 else ""
    yield (
        f"{model['path']}: {model['family']} with {model['layers']} layers, weights in {model['dtype']}, products in "
        f"{model['products']} on {model['device']}{several}; {decisions['target_keep']:.0%} of the decoder stays, "
        f"in space {decisions['space']}{rounds}"
    )
    if decisions["latency"] is not None:
        yield decisions["latency"]["description"]
    yield _in_short(plan)
    yield _parameters(plan)
    yield _widths(plan)
    yield _memory(plan, count)
    yield _cost(plan, count)
    if plan["exchange"]:
        yield _exchange(plan["exchange"])
    yield from _data(plan["data"])
    yield _exports(plan["exports"])
    yield from plan["remarks"]


def _in_short(plan: dict[str, Any]) -> str:
    """The three figures that decide whether a run is started."""
    several, most = each(plan["model"]["processes"]), max(row["bytes"] for row in plan["memory"])
    found = [f"at most {size(most)} of memory{several} beyond the libraries'{_free(plan)}"]
    if plan["flops_per_second"] is not None:
        seconds = sum(row["seconds"] for row in plan["cost"])
        found.insert(0, f"about {duration(seconds)} of computation here, {_probed(plan)}")
    if "epochs" in plan["data"]:
        found.append(f"{plan['data']['epochs']:.2f} epochs")
    return f"In short: {'; '.join(found)}"


def _free(plan: dict[str, Any]) -> str:
    return "" if plan["free_memory"] is None else f", of {size(plan['free_memory'])} that are free here"


def _probed(plan: dict[str, Any]) -> str:
    return "by one step of a layer (--probe is closer)" if plan["quick_probe"] else "by a probe of a few layers"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:,.2f} {unit}" if unit == "GB" else f"{count / one:,.0f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _parameters(plan: dict[str, Any]) -> Table:
    found = plan["parameters"]
    share = f"{found['decoder_share']:.2%}"
    table = _table(f"Parameters (equal widths keep {share} of the decoder)", "", "before", "", "after", "")
    for part in (*PARTS, "total"):
        before, after = found["before"][part], found["after"][part]
        cells = (f"{before['parameters']:,}", size(before["bytes"]), f"{after['parameters']:,}", size(after["bytes"]))
        table.add_row(part, *cells)
    if (active := found["active"]) is not None:
        table.add_row("of a token", f"{active['before']:,}", "", f"{active['after']:,}", "")
    return table


def _widths(plan: dict[str, Any]) -> Table:
    table = _table("Widths of every layer, if all are cut alike", "structure", "kept", "of", "multiple of")
    for name, width in plan["widths"].items():
        table.add_row(name, _range(width["kept"]), _range(width["of"]), str(width["multiple"]))
    return table


def _range(counts: int | list[int]) -> str:
    """A number for all layers, or the least and the most of them."""
    return f"{min(counts):,} to {max(counts):,}" if isinstance(counts, list) else f"{counts:,}"


def each(count: int) -> str:
    """What is said of a table whose figures are those of one process of several."""
    return " of each process" if count > 1 else ""


def _memory(plan: dict[str, Any], count: int) -> Table:
    rows = plan["memory"]
    table = _table(f"Memory{each(count)} at the peak of each part, without libraries", "part", "peak")
    table.add_column("which is")
    largest = max(row["bytes"] for row in rows)
    for row in rows:
        parts = ", ".join(f"{name} {size(count)}" for name, count in row["parts"].items())
        style = "bold" if row["bytes"] == largest else ""
        table.add_row(row["phase"], size(row["bytes"]), parts, style=style)
    return table


def _exchange(rows: list[dict[str, Any]]) -> Table:
    columns = ("step", "reduced", "gathered", "sent by each process")
    table = _table("Exchanged in a step by all processes", *columns)
    for row in rows:
        table.add_row(row["phase"], *(size(row[key]) for key in ("reduced", "gathered", "sent")))
    return table


def _cost(plan: dict[str, Any], count: int) -> Table:
    timed = plan["flops_per_second"] is not None
    title = f"Steps, tokens and operations{each(count)}{', with times ' + _probed(plan) if timed else ''}"
    table = _table(title, "part", "steps", "tokens", "TFLOP", *(["time"] if timed else []))
    rows = plan["cost"]
    total = {key: sum(row[key] or 0 for row in rows) for key in ("steps", "tokens", "flops", "seconds")}
    for row in (*rows, {"phase": "total"} | total):
        cells = [f"{row['steps']:,}" if row["steps"] else "", f"{row['tokens']:,}", f"{row['flops'] / 1e12:,.2f}"]
        table.add_row(row["phase"], *cells, *([duration(row["seconds"])] if timed else []))
    return table


def _data(data: dict[str, Any]) -> Iterator[RenderableType]:
    if "windows" in data:
        table = _table("Data", "", "")
        samples, windows, lengths = data["samples"], data["windows"], data["lengths"]
        rows = {
            "samples": ", ".join(f"{count:,} {name}" for name, count in samples.items()),
            "tokens of a train sample": (
                f"median {lengths['median']:,.0f}, 95 % up to {lengths['percentile_95']:,}, longest {lengths['max']:,}"
            ),
            "longer than a window": f"{data['longer_than_a_window']:,}",
            "left out": _left_out(data["left_out"]),
            "windows": ", ".join(f"{count:,} {name}" for name, count in windows.items()),
            "steps of an epoch": f"{data['steps_per_epoch']:,.1f}",
            "epochs of the run": f"{data['epochs']:.2f}",
            "tokens with a loss": f"{data['scored_share']:.1%}",
        }
        if (asked := data.get("questions")) and asked["sequences"]:
            counted = f"{asked['sequences']:,}, {asked['tokens']:,} tokens, longest {asked['longest']:,}"
            rows["sequences of scored questions"] = counted
        for name, value in rows.items():
            table.add_row(name, value)
        yield table
        yield _sample(data["sample"])
        yield from data["shortfalls"]
    if data["problem"] is not None and refused(data) is None:  # a refusal comes last, as an error
        yield f"Data: {data['problem']}"


def _left_out(found: dict[str, Any]) -> str:
    rows = ", ".join(f"{count:,} {kind}" for kind, count in found["rows"].items())
    parts = [f"{sum(found['rows'].values()):,} rows ({rows})"] if rows else []
    if found["near_duplicates"]:
        parts.append(f"{found['near_duplicates']:,} near-duplicates of held-out documents")
    return ", ".join(parts) or "nothing"


def _sample(pieces: list[dict[str, Any]]) -> Text:
    shown = Text("The first window, tokens with a loss marked: ", style="")
    for piece in pieces:
        text = shorten(piece["text"], 4000)
        shown.append(f"{_MARKS[0]}{text}{_MARKS[1]}" if piece["loss"] else text, style="bold" if piece["loss"] else "")
    return shown


def _exports(rows: list[dict[str, Any]]) -> Table:
    table = _table("Formats that can hold the result", "format")
    table.add_column("reached")
    for row in rows:
        table.add_row(row["name"], "yes" if row["reachable"] else f"no: {row['why_not']}")
    return table
