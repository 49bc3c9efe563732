"""The CSV of an experiment: one row per run, in a file that only grows."""

from __future__ import annotations

import csv
import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atp.config import ATPConfig
from atp.data import Task
from atp.evaluation.bootstrap import percentile_interval
from atp.evaluation.metrics import perplexity_of
from atp.evaluation.relative import majority_samples, score_samples
from atp.ground.environment import device_name
from atp.ground.files import read_json, write_csv
from atp.inputs.folders import INPUTS
from atp.report.files import read_metrics
from atp.studies.compare.results import Member

_SAME_RUN = ("experiment", "domain", "arm", "seed", "config")
_MODEL = ("base weights", "model config", "tokenizer")  # of the inputs that a run was started with
_ANEW = ("config", "device")  # what may differ where a run is read once more

CsvRow = dict[str, Any]


def member_row(
    member: Member,
    folder: Path,
    tasks: Sequence[Task],
    common: ATPConfig,
    majority: Mapping[str, dict[str, Any]],
    finished: str = "summary.json",
) -> CsvRow:
    """One run as a row: size, scores with 95 % intervals, cost, and the effect of its decisions and its cut.

    majority: the result of `majority_scores`; its scores stand beside the run's. finished: the file that was written
    with the scores.
    """
    summary, scores = member.summary, member.scores
    row: CsvRow = {"config": fingerprint(common, folder), "target_keep": summary["target_keep"]}
    row |= {key: summary[key] for key in ("keep_decoder", "keep_total", "params_after")}
    for name, (value, draws) in score_samples(scores["final"], tasks).items():
        low, high = percentile_interval(draws)
        row |= {name: round(float(value), 4), f"{name} low": round(low, 4), f"{name} high": round(high, 4)}
    for name, (value, _) in majority_samples(majority, tasks).items():
        row[f"{name} majority label"] = round(float(value), 4)
    row["original perplexity"] = round(scores["original"]["perplexity"], 4)
    if "validation" in summary:
        row["validation perplexity"] = round(validation_perplexity(summary["validation"]), 4)
    seconds = sum(value for phase, value in summary["seconds"].items() if phase != "total")
    row |= {"train_tokens": summary["train_tokens"], "train_seconds": round(seconds, 1)}
    certificate = summary.get("certificate", {})
    row |= {key: certificate.get(key, "") for key in ("frozen_vs_cut", "masked_vs_cut")}
    row["changed"] = changed_share(folder)
    row |= {
        "device": device_name(),
        "torch": summary["versions"]["torch"],
        "commit": summary["versions"].get("commit", ""),
        "finished": time.strftime("%F %R", time.gmtime((folder / finished).stat().st_mtime)),
    }
    return row


def validation_perplexity(validation: Mapping[str, Any]) -> float:
    """That of the adapter that a run ended with, from the section `validation` of its summary (losses in nats)."""
    best = validation["best"]
    kept = best is not None and best["step"] == validation["kept_step"]
    return float(perplexity_of(np.array([best["loss"] if kept else validation["last"], 1.0])))


def fingerprint(config: ATPConfig, folder: Path) -> str:
    """Eight hex digits of all that a run's result depends on, except arm and seed: settings, and the model's content.

    folder: of the run.
    """
    inputs = read_json(folder / INPUTS) or {}
    values = config.model_dump(mode="json", exclude={"output_dir"}) | {name: inputs.get(name) for name in _MODEL}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def changed_share(folder: Path) -> float | str:
    """Mean share of decisions that a decision step flips once the budget is reached; "" without decisions."""
    searched = [record for record in read_metrics(folder) if "changed" in record]  # scores of a split have none
    reached = [r["changed"] for r in searched if r["target_keep"] == searched[-1]["target_keep"]]
    return round(statistics.fmean(reached), 6) if reached else ""


def _figures(row: CsvRow) -> dict[str, str]:
    return {key: str(value) for key, value in row.items() if key not in _ANEW and value != ""}


def append_rows(path: Path, rows: list[CsvRow]) -> None:
    """Writes rows to a CSV file, replacing those of the same runs; other rows stay, and columns are added as needed.

    A row with the same figures is of the same run, whatever its fingerprint was made of when it was written.
    """
    old = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    fresh = {tuple(str(row[key]) for key in _SAME_RUN) for row in rows}
    figures = [_figures(row) for row in rows]
    kept = [row for row in old if tuple(row[key] for key in _SAME_RUN) not in fresh and _figures(row) not in figures]
    write_csv(path, kept + rows)
