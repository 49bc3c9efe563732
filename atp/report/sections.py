"""The sections of the page. Each takes the run and returns HTML, or nothing when the run has nothing for it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from atp.removal.certify import LIMITS, MEANING
from atp.report import plots
from atp.report.files import RunFiles
from atp.report.markup import DASH, card, definition, details, escape, figure, number, paragraph, section, table

MODELS = {"original": "original", "tuned_dense": "tuned dense", "final": "cut and tuned"}
METRICS = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"
}  # fmt: skip

_MOST_STRUCTURES = 8


def notes(run: RunFiles) -> str:
    """What is missing, in front of everything else."""
    missing = list(run.notes)
    if not plots.available():
        missing.append("There are no plots: run pip install matplotlib, then atp report again.")
    return f"<aside>{''.join(paragraph(note) for note in missing)}</aside>" if missing else ""


def headline(run: RunFiles) -> str:
    """The figures that anyone would quote."""
    return f'<div class="cards">{"".join(_cards(run))}</div>'


def scores(run: RunFiles) -> str:
    """Quality, size and speed of the original, the tuned dense and the final model."""
    summary = run.summary
    names = [name for name in MODELS if name in summary.get("perplexity", {})]
    params = {"original": "params_before", "tuned_dense": "params_before", "final": "params_after"}
    decoder = {"final": summary.get("keep_decoder")}
    rows = []
    if names:
        bounds = summary.get("perplexity_interval") or {}
        cells = [_with_interval(summary["perplexity"][name], bounds.get(name), 2) for name in names]
        rows.append(("held-out perplexity ↓", cells))
    for task in summary.get("tasks", ()):
        for metric, label in METRICS.items():
            scored = [summary[task].get(name, {}) for name in names]
            cells = [_with_interval(s.get(metric), s.get(f"{metric}_interval"), 3) for s in scored]
            rows.append((f"{escape(task)} {label} ↑", cells))
    rows.append(("parameters", [_millions(summary.get(params[name])) for name in names]))
    rows.append(("share of decoder", [number(decoder.get(name, 1.0), 3) for name in names]))
    rows.append(("megabytes", [number(_size(summary, name), 0) for name in names]))
    for kind in ("prefill", "decode"):
        rows.append(
            (f"{kind}, tokens/s ↑", [number(_get(summary, "speed", n, f"{kind}_tokens_per_second"), 1) for n in names])
        )
    shown = [[label, *cells] for label, cells in rows if any(cell != DASH for cell in cells)]
    note = paragraph("In brackets: 95 % bootstrap intervals over documents and questions.") if names else ""
    return section("Scores", table(["", *(MODELS[name] for name in names)], shown), note)


def training(run: RunFiles) -> str:
    """How the run went: losses, budget and decisions over time, and a table by phase."""
    figures = (
        figure(plots.losses(run.metrics), "Loss by phase: each step (faint) and the mean of the last ten."),
        figure(plots.kept_share(run.metrics), "Share of the decoder kept by the hard mask, and the scheduled target."),
        figure(plots.changed_decisions(run.metrics), "Decisions that changed since the last decision step."),
        figure(plots.lasso(run.metrics), "Group lasso on removed LoRA groups; the line ends where it reaches zero."),
    )
    grid = f'<div class="figures">{"".join(figures)}</div>' if any(figures) else ""
    return section("Training", grid, _phases(run))


def widths(run: RunFiles) -> str:
    """What is left of every layer."""
    sizes, layers = run.decisions.get("sizes") or {}, run.decisions.get("layers") or []
    shares = {name: [len(layer.get(name, ())) / size for layer in layers] for name, size in sizes.items() if size}
    if len(shares) > _MOST_STRUCTURES:
        shares = {}  # no mask space has so many, and each is a picture of its own
    plot = figure(plots.widths(shares), f"Share of each structure kept, by layer (space {run.decisions.get('space')}).")
    rows = [[str(i), *(number(len(layer.get(name, ()))) for name in sizes)] for i, layer in enumerate(layers)]
    counts = table(["layer", *(f"{name} (of {size})" for name, size in sizes.items())], rows)
    return section("Widths by layer", plot, details("Counts", counts) if plot else counts)


def certificate(run: RunFiles) -> str:
    """The proof that cutting changed nothing, with a verdict on each check."""
    rows = []
    for key, label in MEANING.items():
        if key in run.certificate:
            value, limit = run.certificate[key], LIMITS[key]
            verdict = '<b class="pass">pass</b>' if _passes(value, limit) else '<b class="fail">FAIL</b>'
            rows.append([escape(label), number(value, 3), f"≤ {limit:g}" if limit else "exactly 0", verdict])
    other = [(key, value) for key, value in run.certificate.items() if key not in (*MEANING, "limits")]
    return section("Certificate", table(["check", "value", "limit", ""], rows), definition(other))


def settings(run: RunFiles) -> str:
    """How to get this run again: command, seed, config, data, versions."""
    summary = run.summary
    data, versions = summary.get("data") or {}, summary.get("versions") or {}
    known = [(key, summary[key]) for key in ("command", "seed") if key in summary]
    return section(
        "Settings",
        definition(known),
        details("Config", f"<pre>{escape(run.config)}</pre>" if run.config else ""),
        details("Data", definition(_flat(data))),
        details("Versions", definition(_flat(versions))),
    )


def _cards(run: RunFiles) -> Iterator[str]:
    summary = run.summary
    before, after = summary.get("params_before"), summary.get("params_after")
    if before and after:
        yield card(
            "parameters", f"{number(after / 1e6, 1)} M", f"of {number(before / 1e6, 1)} M ({after / before:.1%})"
        )
    if summary.get("keep_decoder") is not None:
        yield card("decoder kept", f"{summary['keep_decoder']:.1%}", f"target {number(summary.get('target_keep'), 3)}")
    if summary.get("perplexity"):
        yield _score_card("perplexity", summary["perplexity"], 2)
    if summary.get("relative_performance") is not None:
        low, high = summary["relative_performance_interval"]
        note = f"of the tuned dense model's scores (95 %: {low:.1%} to {high:.1%})"
        yield card("relative performance", f"{summary['relative_performance']:.1%}", note)
    for task in summary.get("tasks", ()):
        metric = "macro_f1" if any("macro_f1" in s for s in summary[task].values()) else "rougeL"
        yield _score_card(f"{task} {METRICS[metric]}", {n: s.get(metric) for n, s in summary[task].items()}, 3)
    old, new = (_get(summary, "speed", name, "decode_tokens_per_second") for name in ("original", "final"))
    if old and new:
        yield card("decode speed", f"{new / old:.2f} ×", f"{number(new, 1)} against {number(old, 1)} tokens/s")
    if run.certificate:
        good = all(_passes(run.certificate.get(key), limit) for key, limit in LIMITS.items())
        yield card("certificate", "pass" if good else "FAIL", "details below", "pass" if good else "fail")


def _with_interval(value: object, bounds: list[float] | None, digits: int) -> str:
    """A score and, in brackets, its interval."""
    if value is None or not bounds:
        return number(value, digits)
    return f"{number(value, digits)} ({number(bounds[0], digits)} – {number(bounds[1], digits)})"


def _score_card(label: str, values: dict[str, Any], digits: int) -> str:
    """The newest score large, the earlier ones beside their names."""
    names = [name for name in MODELS if values.get(name) is not None]
    if not names:
        return ""
    *earlier, last = names
    note = ", ".join(f"{MODELS[name]} {number(values[name], digits)}" for name in earlier)
    return card(f"{label}, {MODELS[last]}", number(values[last], digits), note)


def _phases(run: RunFiles) -> str:
    """One row a phase: steps, loss at both ends, speed and time; the summary's figures where it has them."""
    rates = dict(run.summary.get("train_tokens_per_second") or {})
    seconds = dict(run.summary.get("seconds") or {})
    rows = []
    for phase, group in groupby(run.metrics, key=lambda record: record["phase"]):
        records = list(group)
        losses = [record["loss"] for record in records if record.get("loss") is not None]
        speeds = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
        rate = rates.pop(phase, None) or (statistics.median(speeds) if speeds else None)
        ends = [number(statistics.fmean(part)) if part else DASH for part in (losses[:10], losses[-10:])]
        span = f"{records[0]['step']} to {records[-1]['step']}"
        rows.append([escape(phase), span, *ends, number(rate, 0), number(seconds.pop(phase, None), 0)])
    for phase in [*rates, *(name for name in seconds if name not in rates)]:
        label = escape(MODELS.get(phase, phase).replace("_", " "))
        rows.append([label, "", "", "", number(rates.get(phase), 0), number(seconds.get(phase), 0)])
    return table(["phase", "steps", "loss, first 10", "loss, last 10", "tokens/s", "seconds"], rows)


def _millions(count: int | None) -> str:
    return DASH if count is None else f"{number(count / 1e6)} M"


def _passes(value: object, limit: float) -> bool:
    """Whether a measured value is a number within its limit (NaN is not)."""
    return isinstance(value, (int, float)) and value <= limit


def _size(summary: dict[str, Any], name: str) -> object:
    """Megabytes of a model; the tuned dense one has the original's size."""
    sizes = summary.get("megabytes") or {}
    return sizes.get("original" if name == "tuned_dense" else name)


def _get(values: dict[str, Any], *keys: str) -> Any:
    """A nested value, None where the path ends early."""
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return None
        values = values[key]
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested names and values as one list of dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
