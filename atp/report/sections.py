"""The content of each section of a run's page, as text and plots for the template."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from markupsafe import Markup

from atp.removal.certify import MEANING, failure, holds, limit_of
from atp.report import beside, plots
from atp.report.beside import METRICS, MODELS, NOT_MEASURABLE
from atp.report.files import RunFiles
from atp.report.text import DASH, number

Card = dict[str, str]

_MOST_STRUCTURES = 8


def notes(run: RunFiles) -> list[str]:
    """What is missing, shown before everything else."""
    missing = list(run.notes)
    if not plots.available():
        missing.append("There are no plots: run pip install matplotlib, then atp report again.")
    return missing


def headline(run: RunFiles) -> list[Card]:
    """The figures that anyone would quote."""
    return list(_cards(run))


def scores(run: RunFiles) -> dict[str, Any]:
    """Quality, size and speed of the original, the tuned dense and the final model, and the majority label's scores."""
    summary = run.summary
    columns = beside.columns(summary)
    decoder = {"final": summary.get("keep_decoder"), "majority": None}
    rows: list[tuple[str, list[str]]] = []
    for task in summary.get("tasks", ()):
        for metric, label in METRICS.items():
            scored = [column["tasks"].get(task, {}) for column in columns.values()]
            cells = [with_interval(s.get(metric), s.get(f"{metric}_interval"), 3) for s in scored]
            rows.append((f"{task} {label} ↑", cells))
    for key, label, digits in beside.scores_of_text(summary) if columns else ():
        cells = [with_interval(c.get(key), c.get(f"{key}_interval"), digits) for c in columns.values()]
        rows.append((f"{label} ↓", cells))
    rows.append(("parameters", [_millions(beside.parameters(summary, name)) for name in columns]))
    for part, label in (("words", "in embedding and head"), ("attention", "in attention"), ("mlp", "in MLPs")):
        rows.append((label, [_millions(beside.parameters_in(summary, name, part)) for name in columns]))
    rows.append(("share of decoder", [number(decoder.get(name, 1.0), 3) for name in columns]))
    rows.append(("megabytes", [number(beside.megabytes(summary, name), 0) for name in columns]))
    for kind in ("prefill", "decode"):
        rate = f"{kind}_tokens_per_second"
        speeds = [_get(summary, "speed", name) or {} for name in columns]
        cells = [with_interval(s.get(rate), s.get(f"{rate}_interval"), 1) for s in speeds]
        rows.append((f"{kind}, tokens/s ↑", cells))
    shown = [[label, *cells] for label, cells in rows if any(cell != DASH for cell in cells)]
    head = ["", *((MODELS | beside.OTHERS)[name] for name in columns)]
    return {"head": head, "rows": shown, "intervals": bool(columns), "remarks": beside.result_remarks(summary)}


def answers(run: RunFiles) -> dict[str, Any]:
    """One question of the test split, how it was chosen, and what each model answered."""
    pairs = beside.answers(run.summary)
    return {"prompt": pairs[0][1], "given": pairs[1:], "chosen": run.summary["answers"]["chosen"]} if pairs else {}


def samples(run: RunFiles) -> list[dict[str, Any]]:
    """A few held-out prompts, each with the reference and every model's answer as (title, text)."""
    return [
        {
            "prompt": str(sample["prompt"]),
            "columns": [
                ("reference", str(sample["reference"])),
                *((MODELS.get(name, name), str(answer)) for name, answer in sample["models"].items()),
            ],
        }
        for sample in run.summary.get("samples") or []
    ]


def training(run: RunFiles) -> dict[str, Any]:
    """How the run went: losses, budget and decisions over time, and a table by phase."""
    watched = any("validation_loss" in record for record in run.metrics)
    more = ", and the validation loss" if watched else ""
    figures = (
        (plots.losses(run.metrics), f"Loss by phase: each step (faint) and the mean of the last ten{more}."),
        (plots.kept_share(run.metrics), "Share of the decoder kept by the hard mask, and the scheduled target."),
        (plots.changed_decisions(run.metrics), "Decisions that changed since the last decision step."),
        (plots.lasso(run.metrics), "Group lasso on removed LoRA groups; the line ends where it reaches zero."),
    )
    return {"figures": [(Markup(svg), caption) for svg, caption in figures if svg], "phases": list(_phases(run))}


def widths(run: RunFiles) -> dict[str, Any]:
    """What is left of every layer."""
    layers = run.decisions.get("layers") or []
    sizes = {name: _by_layer(size, layers) for name, size in (run.decisions.get("sizes") or {}).items()}
    shares = {
        name: [len(layer.get(name, ())) / max(size, 1) for layer, size in zip(layers, of, strict=True)]
        for name, of in sizes.items()
        if any(of)
    }
    if len(shares) > _MOST_STRUCTURES:
        shares = {}  # no mask space has so many, and each is a picture of its own
    rows = [[str(i), *(number(len(layer.get(name, ()))) for name in sizes)] for i, layer in enumerate(layers)]
    return {
        "plot": Markup(plots.widths(shares)),
        "space": str(run.decisions.get("space")),
        "head": ["layer", *(f"{name} (of {_range(of)})" for name, of in sizes.items())],
        "rows": rows,
    }


def certificate(run: RunFiles) -> dict[str, Any]:
    """The proof that cutting changed nothing, with a verdict on each check."""
    checks = []
    for key, label in MEANING.items():
        if key in run.certificate:
            value, limit = run.certificate[key], limit_of(key)
            checks.append((label, number(value, 3), f"≤ {limit:g}" if limit else "exactly 0", holds(key, value)))
    facts = [(key, str(value)) for key, value in run.certificate.items() if key not in (*MEANING, "limits")]
    return {"checks": checks, "facts": facts}


def settings(run: RunFiles) -> dict[str, Any]:
    """How to repeat this run: command, seed, config, data, versions."""
    summary = run.summary
    data, versions = summary.get("data") or {}, summary.get("versions") or {}
    return {
        "known": [(key, str(summary[key])) for key in ("command", "seed") if key in summary],
        "config": run.config,
        "data": list(_flat(data)),
        "versions": list(_flat(versions)),
    }


def with_interval(value: object, bounds: list[float] | None, digits: int) -> str:
    """A score with its interval in parentheses."""
    if value is None or not bounds:
        return number(value, digits)
    return f"{number(value, digits)} ({number(bounds[0], digits)} – {number(bounds[1], digits)})"


def _by_layer(size: Any, layers: list[Any]) -> list[int]:
    """The decisions of a structure in each layer; decisions.json has one number where all layers have as many."""
    return size if isinstance(size, list) else [size] * len(layers)


def _range(sizes: list[int]) -> str:
    """One number, or the least and the most."""
    return " to ".join(map(str, dict.fromkeys((min(sizes), max(sizes))))) if sizes else DASH


def _cards(run: RunFiles) -> Iterator[Card]:
    summary = run.summary
    before, after = summary.get("params_before"), summary.get("params_after")
    if before and after:
        yield _card(
            "parameters", f"{number(after / 1e6, 1)} M", f"of {number(before / 1e6, 1)} M ({after / before:.1%})"
        )
    if summary.get("keep_decoder") is not None:
        yield _card("decoder kept", f"{summary['keep_decoder']:.1%}", f"target {number(summary.get('target_keep'), 3)}")
    if summary.get("relative_performance") is not None:
        low, high = summary["relative_performance_interval"]
        note = f"of the tuned dense model's scores (95 %: {low:.1%} to {high:.1%})"
        yield _card("relative performance", f"{summary['relative_performance']:.1%}", note)
    elif summary.get("not_measurable"):
        note = "the tuned dense model does not clearly beat the majority label"
        yield _card("relative performance", NOT_MEASURABLE, note)
    if summary.get("vocabulary"):
        words = summary["vocabulary"]["words"]
        yield _card("words kept", f"{words['after']:,}", f"of {words['before']:,}")
    for task in summary.get("tasks", ()):
        metric = beside.main_metric(summary, task)
        values = {name: scored.get(metric) for name, scored in summary[task].items()}
        floor = _get(summary, "majority", task, metric)
        yield from _score_card(f"{task} {METRICS[metric]}", values, 3, {beside.OTHERS["majority"]: floor})
    if summary.get("perplexity"):
        key, label, digits = beside.compared_text(summary)
        yield from _score_card(label if key != "perplexity" else key, summary[key], digits)
    old, new = (_get(summary, "speed", name, "decode_tokens_per_second") for name in ("original", "final"))
    if old and new:
        yield _card("decode speed", f"{new / old:.2f} ×", f"{number(new, 1)} against {number(old, 1)} tokens/s")
    if run.certificate:
        good = failure(run.certificate) is None
        yield _card("certificate", "pass" if good else "FAIL", "details below", "pass" if good else "fail")


def _card(label: str, value: str, note: str = "", kind: str = "") -> Card:
    """One headline figure. kind: a CSS class."""
    return {"label": label, "value": value, "note": note, "kind": kind}


def _score_card(
    label: str, values: dict[str, Any], digits: int, others: dict[str, Any] | None = None
) -> Iterator[Card]:
    """The newest score large, with the earlier ones and those of others in the note; nothing without a score."""
    names = [name for name in MODELS if values.get(name) is not None]
    if names:
        *earlier, last = names
        small = {MODELS[name]: values[name] for name in earlier} | (others or {})
        note = ", ".join(f"{name} {number(value, digits)}" for name, value in small.items() if value is not None)
        yield _card(f"{label}, {MODELS[last]}", number(values[last], digits), note)


def _phases(run: RunFiles) -> Iterator[list[str]]:
    """One row per phase: steps, loss at both ends, speed and time, preferring the summary's figures."""
    rates = dict(run.summary.get("train_tokens_per_second") or {})
    seconds = dict(run.summary.get("seconds") or {})
    for phase, group in groupby(run.metrics, key=lambda record: record["phase"]):
        records = list(group)
        losses = [record["loss"] for record in records if record.get("loss") is not None]
        speeds = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
        rate = rates.pop(phase, None) or (statistics.median(speeds) if speeds else None)
        ends = [number(statistics.fmean(part)) if part else DASH for part in (losses[:10], losses[-10:])]
        span = f"{records[0]['step']} to {records[-1]['step']}"
        yield [phase, span, *ends, number(rate, 0), number(seconds.pop(phase, None), 0)]
    total = seconds.pop("total", None)
    if total is not None:
        rest = total - sum(spent for name, spent in run.summary["seconds"].items() if name != "total")
        if rest > 0:  # the total of a resumed run is that of its last part
            seconds["loading, scoring, export"] = rest
        seconds["total"] = total
    for phase in [*rates, *(name for name in seconds if name not in rates)]:
        label = MODELS.get(phase, phase).replace("_", " ")
        yield [label, "", "", "", number(rates.get(phase), 0), number(seconds.get(phase), 0)]


def _millions(count: int | None) -> str:
    return DASH if count is None else f"{number(count / 1e6)} M"


def _get(values: dict[str, Any], *keys: str) -> Any:
    """A nested value; None if the path ends early."""
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return None
        values = values[key]
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values with dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
