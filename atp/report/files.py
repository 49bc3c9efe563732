"""What a run folder holds, as far as it got."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atp.errors import InputError


@dataclass
class RunFiles:
    """The records of a run; what is missing is empty, and `notes` says so in sentences."""

    name: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    decisions: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunFiles:
    """Reads metrics.jsonl, summary.json, decisions.json, certificate.json and config.yaml of a run folder.

    A run without a summary takes the scores that exist from evaluation.json. Raises `InputError` when the folder has
    none of these files.
    """
    run = RunFiles(name=folder.resolve().name)
    run.config = _text(folder / "config.yaml")
    run.metrics = _metrics(_text(folder / "metrics.jsonl"), run.notes)
    run.summary = _json(folder / "summary.json", run.notes)
    run.decisions = _json(folder / "decisions.json", run.notes)
    run.certificate = _json(folder / "certificate.json", run.notes) or dict(run.summary.get("certificate") or {})
    if not run.summary:
        run.summary = _partial_summary(_json(folder / "evaluation.json", run.notes))
        run.notes.insert(0, "The run has no summary.json: it did not finish. Continue it with --resume.")
    if not (run.config or run.metrics or run.decisions or run.certificate or run.summary):
        raise InputError(f"{folder} is not a run folder: it has none of config.yaml, metrics.jsonl and summary.json")
    missing = {
        "config.yaml": run.config, "metrics.jsonl": run.metrics, "decisions.json": run.decisions,
        "certificate.json": run.certificate,
    }  # fmt: skip
    run.notes += [
        f"{name} is missing, and with it a part of this page." for name, found in missing.items() if not found
    ]
    return run


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path)
    if not text:
        return {}
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} is damaged and was left out.")
        return {}
    return content


def _metrics(text: str, notes: list[str]) -> list[dict[str, Any]]:
    records, bad = [], 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
            records.append({"step": int(record["step"]), "phase": str(record["phase"]), **record})
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            # A run that was killed may leave half a line.
            bad += 1
    if bad:
        notes.append(f"metrics.jsonl: {bad} unreadable line(s) were left out.")
    return records


def _partial_summary(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The part of a summary that the scores taken so far give."""
    models = {name: scores for name, scores in evaluation.items() if "perplexity" in scores}
    if not models:
        return {}
    tasks = list(next(iter(models.values())).get("tasks", {}))
    sizes = {name: scores["size"] for name, scores in models.items() if "size" in scores}
    return {
        "perplexity": {name: scores["perplexity"] for name, scores in models.items()},
        "perplexity_interval": {name: scores.get("perplexity_interval") for name, scores in models.items()},
        "tasks": tasks,
        **{task: {name: scores["tasks"][task] for name, scores in models.items()} for task in tasks},
        "speed": {name: scores["speed"] for name, scores in models.items() if "speed" in scores},
        "megabytes": {name: size["megabytes"] for name, size in sizes.items()},
        "params_before": sizes.get("original", {}).get("params"),
    }
