"""The records in a run folder, finished or not."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from atp.config.training import TrainingConfig
from atp.ground.errors import InputError, shorten
from atp.ground.reading import parse_json, read_yaml
from atp.report.beside import bits_per_byte, perplexity_of

_PACE = 20  # records of which the pace is that of the run


@dataclass
class RunFiles:
    """The records of a run; missing ones are empty, and `notes` has a sentence about each.

    dense: the metrics of the dense model that it tuned.
    """

    name: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    decisions: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    dense: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path, *, under_way: bool = False) -> RunFiles:
    """Reads metrics.jsonl, summary.json, decisions.json, certificate.json and resolved.yaml of a run folder.

    Without a summary, scores come from evaluation.json. under_way: the run is at work. Raises `InputError` if the
    folder has none of these files.
    """
    run = RunFiles(name=folder.resolve().name)
    try:
        _fill(run, folder, under_way)
    except OSError as error:
        reason = shorten(error.strerror)
        raise InputError(f"cannot read {shorten(error.filename)} ({reason}): check its permissions") from None
    if not (run.config or run.metrics or run.decisions or run.certificate or run.summary):
        raise InputError(
            f"{shorten(folder)} is not a run folder: it has none of config.yaml, metrics.jsonl and summary.json"
        )
    missing = {
        "config.yaml": run.config, "metrics.jsonl": run.metrics, "decisions.json": run.decisions,
        "certificate.json": run.certificate,
    }  # fmt: skip
    if not under_way:
        run.notes += [
            f"{name} is missing, and part of this page with it." for name, found in missing.items() if not found
        ]
    return run


def standing(run: RunFiles) -> str:
    """Where a run at work is: phase, step, and how long it will train at its present pace."""
    if run.certificate or run.summary.get("params_after"):
        return "trained; scores, speed and report follow"
    steps = [record for record in run.metrics or run.dense if record.get("loss") is not None]
    if not steps:
        return "before the first step"
    last, total = steps[-1], _total(run.config)
    now = f"{last['phase'].replace('_', ' ')}, step {last['step']:,}"
    if total is None:
        return now
    pace, left = _pace(steps), total - last["step"]
    if pace is None or left <= 0:
        return f"{now} of {total:,}"
    seconds = left * pace
    time = f"{seconds / 60:,.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f"{now} of {total:,}, about {time} of {'training' if run.metrics else 'this part'} left"


def _pace(steps: list[dict[str, Any]]) -> float | None:
    """Seconds per step in the latest phase that has two records; None without any."""
    for _, group in groupby(reversed(steps), key=lambda record: record["phase"]):
        timed = [record for record in group if isinstance(record.get("phase_seconds"), (int, float))][:_PACE]
        if timed and (done := timed[0]["step"] - timed[-1]["step"]) > 0:
            return float(timed[0]["phase_seconds"] - timed[-1]["phase_seconds"]) / done
    return None


def _total(config: str) -> int | None:
    """The LoRA steps of a run; None if its config cannot be read."""
    try:
        return TrainingConfig.model_validate(read_yaml(config, "config.yaml")["training"]).total
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _fill(run: RunFiles, folder: Path, under_way: bool) -> None:
    run.config = _text(folder / "resolved.yaml") or _text(folder / "config.yaml")
    run.metrics = _metrics(_text(folder / "metrics.jsonl"), run.notes)
    run.dense = read_metrics(folder / "dense_lora")
    run.summary = _json(folder / "summary.json", run.notes)
    run.decisions = _json(folder / "decisions.json", run.notes)
    run.certificate = _json(folder / "certificate.json", run.notes) or _section(run.summary, "certificate")
    if not run.summary:
        run.summary = _partial_summary(_json(folder / "evaluation.json", run.notes))
        stopped = "The run has no summary.json: it did not finish. Continue it with --resume."
        if run.certificate and not run.config:
            stopped = (
                "There is no summary.json and no config.yaml, as ATPTrainer leaves a folder: it takes no scores. "
                "atp.Run(config).execute() does all that atp train does."
            )
        begun = f"The run is at work: {standing(run)}. This page shows what there is so far."
        run.notes.insert(0, begun if under_way else stopped)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, each with step and phase, without unreadable lines."""
    return _metrics(_text(folder / "metrics.jsonl"), [])


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path)
    if not text:
        return {}
    try:
        content = parse_json(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} is damaged and was skipped.")
        return {}
    return content


def _metrics(text: str, notes: list[str]) -> list[dict[str, Any]]:
    records, bad = [], 0
    for line in text.splitlines():
        try:
            record = parse_json(line)
            records.append({**record, "step": int(record["step"]), "phase": str(record["phase"])})
        except (KeyError, TypeError, ValueError, OverflowError):
            # A killed run may leave half a line.
            bad += 1
    if bad:
        notes.append(f"metrics.jsonl: {bad} unreadable line(s) were skipped.")
    return records


def _partial_summary(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The part of a summary that the scores so far allow."""
    found = {name: scores for name, scores in evaluation.items() if isinstance(scores, dict)}
    models = {name: scores for name, scores in found.items() if "perplexity" in scores}
    if not models:
        return {}
    tasks = {name: _section(scores, "tasks") for name, scores in models.items()}
    scored = [task for task in next(iter(tasks.values())) if all(task in taken for taken in tasks.values())]
    sizes = {name: _section(scores, "size") for name, scores in models.items() if "size" in scores}
    return {
        "perplexity": {name: scores["perplexity"] for name, scores in models.items()},
        "perplexity_of": perplexity_of(next(iter(models.values()))),
        "perplexity_interval": {name: scores.get("perplexity_interval") for name, scores in models.items()},
        **bits_per_byte(models),
        "tasks": scored,
        "majority": _section(evaluation, "majority"),
        "vocabulary": _section(evaluation, "vocabulary"),
        **{task: {name: taken[task] for name, taken in tasks.items()} for task in scored},
        "speed": {name: scores["speed"] for name, scores in models.items() if "speed" in scores},
        "megabytes": {name: size.get("megabytes") for name, size in sizes.items()},
        "params_before": sizes.get("original", {}).get("params"),
    }


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A dictionary in a dictionary; empty if it is missing or something else."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}
