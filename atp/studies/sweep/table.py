"""The results of a sweep: rows, the table, the CSV and the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from atp.data import Task
from atp.evaluation.relative import OF_TEXT, kept_of_best
from atp.report import plots
from atp.report.beside import counted
from atp.report.terminal import with_interval
from atp.report.text import DASH
from atp.studies.sweep.targets import SweepTarget

CsvRow = dict[str, Any]
LEAST_KEPT = 0.95  # of the best model's main score, for a target to be recommended
_WITHOUT_TARGET = {"original": "original", "tuned_dense": "tuned, uncut"}


def target_row(target: SweepTarget, summary: Mapping[str, Any], shared: Mapping[str, Any]) -> CsvRow:
    """One finished target. shared: the content of shared.json, whose seconds do not count again."""
    shares = {key: summary[key] for key in ("keep_decoder", "keep_total")}
    asked = {"target": target.asked.text, "keep": target.config.decisions.target_keep}
    row: CsvRow = {"model": "ATP", **asked, **shares} | _scores(summary, "final")
    if summary.get("relative_performance") is not None:
        row |= _figure("of tuned dense", summary["relative_performance"], summary["relative_performance_interval"])
    certificate = summary["certificate"]
    row |= {key: certificate[key] for key in ("masked_vs_cut", "cut_vs_reloaded", "removed_lora_norm", "merge_error")}
    spent = sum(value for phase, value in summary["seconds"].items() if phase != "total")
    return row | {"seconds": round(spent - sum(shared["seconds"].values()), 1), "folder": target.config.output_dir}


def uncut_rows(summary: Mapping[str, Any]) -> list[CsvRow]:
    """The original model, and the tuned dense one if there is one; they are the same in all runs of a sweep."""
    models = [name for name in _WITHOUT_TARGET if name in summary["perplexity"]]
    whole = {"target": None, "keep": 1.0, "keep_decoder": 1.0, "keep_total": 1.0}
    return [{"model": _WITHOUT_TARGET[name], **whole} | _scores(summary, name) for name in models]


def _scores(summary: Mapping[str, Any], model: str) -> CsvRow:
    cut = model == "final"
    row: CsvRow = {
        "parameters": summary["params_after" if cut else "params_before"],
        "megabytes": summary["megabytes"]["final" if cut else "original"],
    }
    for name in (name for name in OF_TEXT if summary.get(name)):
        row |= _figure(name, summary[name][model], summary[f"{name}_interval"][model])
    for task in summary["tasks"]:
        scores = summary[task][model]
        for metric in (name for name in scores if f"{name}_interval" in scores):
            row |= _figure(f"{task} {metric}", scores[metric], scores[f"{metric}_interval"])
    return row


def _figure(name: str, value: float, interval: list[float]) -> CsvRow:
    return {name: value, f"{name} low": interval[0], f"{name} high": interval[1]}


def recommend(
    rows: list[CsvRow], scores: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], seed: int
) -> dict[str, Any] | None:
    """Which target is recommended, and why; every row gets its share of the best model's main score.

    Of all targets that keep at least `LEAST_KEPT` of it by the lower end of the 95 % interval, the one with the fewest
    parameters. scores: target (None: the models without one) -> evaluation.json of its run. tasks: their names.
    None where some row's scores of single items are missing, as in a damaged record.
    """
    uncut, labels = next(iter(scores.values())), {label: name for name, label in _WITHOUT_TARGET.items()}
    models: dict[str, Any] = {
        _name(row): scores[row["target"]].get("final") if row["target"] else uncut.get(labels[row["model"]])
        for row in rows
    }
    majority = uncut.get("majority") or {}
    try:
        found = kept_of_best(models, [_task(name, models, majority) for name in tasks], majority, seed)
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    for row in rows:
        share, *interval = found["kept"][_name(row)]
        row |= _figure("of the best", share, interval)
    good = [row for row in rows if row["target"] and row["of the best low"] >= LEAST_KEPT]
    chosen = _name(min(good, key=lambda row: row["parameters"])) if good else None
    by = f"at least {LEAST_KEPT:.0%} of the best {found['score'].replace('_', '-')} ({found['best']}), by the lower end"
    rule = f"{by} of the 95 % interval"
    return {
        "target": chosen, "score": found["score"], "best": found["best"], "least_kept": LEAST_KEPT,
        "says": f"recommended: {chosen}, the smallest model that keeps {rule}" if chosen else
                f"no target is recommended: none keeps {rule}",
    }  # fmt: skip


def _task(name: str, models: Mapping[str, Any], majority: Mapping[str, Any]) -> Task:
    """A task by what its answers show: its labels that occur, or none for free text."""
    if name not in majority:
        return Task(name, metrics=("rougeL",))
    given = [label for scores in models.values() for item in scores["tasks"][name]["items"] for label in item]
    return Task(name, tuple(sorted({*given, majority[name]["label"]})))


def show(content: Mapping[str, Any], console: Console) -> None:
    """Prints the content of sweep.json."""
    for head, lines in tables(content["rows"]):
        shown = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column, name in enumerate(head):
            # Where the terminal is too narrow for all, a word goes on in the next line: no digit is left out.
            shown.add_column(name, justify="right" if column else "left", no_wrap=not column, overflow="fold")
        for line in lines:
            shown.add_row(*line)
        console.print(shown)
    for sentence in counted(content.get("perplexity_of")):
        console.print(sentence)
    taken = sum(content["shared"]["seconds"].values())
    console.print(
        f"{content['shared']['what']}: {taken:,.0f} seconds; each target's seconds are extra, scoring is not counted"
    )
    if content.get("recommended"):
        console.print(content["recommended"]["says"])
    console.print("certificate: the largest change of a logit at the cut, as a share of their scale")


def tables(rows: list[CsvRow]) -> list[tuple[list[str], list[list[str]]]]:
    """Sizes and scores as (head, lines) of text cells, a line per model. Two, so that each fits a narrow terminal.

    Scores have 95 % intervals in parentheses.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    scores = [name for name in names if f"{name} low" in names]
    sizes = ["model", "share of the decoder", "parameters", "MB", "certificate", "seconds"]
    return [
        (sizes, [[_name(row), *_sizes(row)] for row in rows]),
        (["model", *(name.replace("_", " ") for name in scores)], [[_name(row), *_cells(row, scores)] for row in rows]),
    ]


def _name(row: CsvRow) -> str:
    return str(row["target"] or row["model"])


def _sizes(row: CsvRow) -> list[str]:
    cells = [f"{row['keep_decoder']:.4g}", f"{row['parameters']:,}", f"{row['megabytes']:,.1f}"]
    cut = "masked_vs_cut" in row
    return [*cells, *([f"{row['masked_vs_cut']:.1e}", f"{row['seconds']:,.0f}"] if cut else [DASH, DASH])]


def _cells(row: CsvRow, scores: list[str]) -> list[str]:
    cells = []
    for name in scores:
        digits = 2 if name == "perplexity" else 3
        known = row.get(name) is not None
        cells.append(with_interval(row[name], [row[f"{name} low"], row[f"{name} high"]], digits) if known else DASH)
    return cells


def draw(path: Path, rows: list[CsvRow], title: str) -> None:
    """Writes the curve of held-out perplexity over the share kept, with the uncut models as flat lines.

    Does nothing without matplotlib or before the first target is finished.
    """
    cut = sorted((row for row in rows if row["model"] == "ATP"), key=lambda row: row["keep_decoder"])
    if not cut or not plots.available():
        return
    lines = {"ATP": [(row["keep_decoder"], *_perplexity(row)) for row in cut]}
    ends = (cut[0]["keep_decoder"], cut[-1]["keep_decoder"])
    lines |= {row["model"]: [(x, *_perplexity(row)) for x in ends] for row in rows if row["model"] != "ATP"}
    plots.curves_png(path, {title: lines}, "share of the decoder kept", "held-out perplexity")


def _perplexity(row: CsvRow) -> tuple[float, float, float]:
    return row["perplexity"], row["perplexity low"], row["perplexity high"]
