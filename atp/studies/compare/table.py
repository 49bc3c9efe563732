"""The table of a comparison as text cells, for the terminal, Markdown and HTML alike."""

from __future__ import annotations

from typing import Any

from atp.report.beside import NOT_MEASURABLE, OTHERS, counted, unclear
from atp.report.text import DASH, code, number, plain

BEST_FIRST = {"perplexity": "perplexity ↓", "bits_per_byte": "bits per byte ↓",
              "perplexity_ratio": "perplexity / dense ↓",
              "relative_performance": "relative performance ↑"}  # fmt: skip

_OTHER_TOKENS = " *"
_WIDE = ("all kept", "parameters", "MB", "training tokens", "tokens/s", "seeds")


def table(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) from the content of comparison.json, with intervals in parentheses."""
    methods = content["methods"]
    scores = list(next(iter(methods.values()))["scores"]) if methods else []
    head = ["method", "decoder kept", "all kept", "parameters", "MB"]
    head += [BEST_FIRST.get(name, f"{name.replace('_', ' ')} ↑") for name in scores]
    head += [BEST_FIRST["perplexity_ratio"], BEST_FIRST["relative_performance"]]
    head += ["training tokens", "training s", "tokens/s", "seeds"]
    rows = [_row(name, row, scores) for name, row in methods.items()]
    if content.get("majority"):
        rows.append(_majority_row(content["majority"], scores, len(head)))
    return head, rows


def brief(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the same without intervals and sizes, narrow enough for a terminal."""
    head, rows = table(content)
    shown = [i for i, name in enumerate(head) if name not in _WIDE]
    return [head[i] for i in shown], [[row[i].partition(" (")[0] for i in shown] for row in rows]


def markdown(content: dict[str, Any]) -> str:
    """The table with a heading, remarks and the command."""
    head, rows = table(content)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    notes = [f"* {plain(note)}" for note in comparison_remarks(content)]
    return "\n".join(
        [f"# Comparison at {content['target_keep']:.0%} of the decoder", ""]
        + [f"| {' | '.join(map(plain, line))} |" for line in lines]
        + ["", *notes, "", code(content["command"]), ""]
    )


def comparison_remarks(content: dict[str, Any]) -> list[str]:
    """What a reader of the table must know, one or two sentences each."""
    found = [
        "In parentheses: 95 % bootstrap intervals over seeds and over test documents and questions, which are the same "
        "for all methods.",
        "Relative performance: mean over the tasks' metrics of score / score of the tuned dense model with the same "
        "seed. A metric counts if that model beats the majority label, the constant answer, by more than the interval "
        "of their difference.",
        "Training seconds include choosing and removing; all methods train on the same tokens with the same LoRA.",
        *_rivals(content["methods"]),
        *counted(content.get("perplexity_of")),
        content["data"]["description"],
    ]
    found += unclear(content.get("not_measurable", {}))
    if content["missing"]:
        found.append(f"Not finished: {'; '.join(content['missing'])}.")
    return found + [f"{name}: {reason}." for name, reason in content["notes"].items()]


def _rivals(methods: dict[str, Any]) -> list[str]:
    """What differs in the rivals; nothing without any."""
    rivals = {name: row["rival"] for name, row in methods.items() if "rival" in row}
    if not rivals:
        return []
    found = [
        "A rival is tuned whole on the same documents. Its perplexity (*) is of its own tokens, and not comparable "
        "where these are others: compare bits per byte and task scores."
    ]
    for name, rival in rivals.items():
        seconds = rival["seconds"]
        length = "as many steps as the config has" if seconds is None else f"as long as atp, {seconds:,.0f} seconds"
        why = ", because there was no atp to take the time of" if seconds is None else ""
        found.append(f"{name} trained {length}{why}.")
        if rival.get("other_text"):
            found.append(f"{name} read other text: its chat template writes conversations in another way.")
    return found


def _row(name: str, row: dict[str, Any], scores: list[str]) -> list[str]:
    cells = [name, *(number(row[key], 3) for key in ("keep_decoder", "keep_total"))]
    cells += [f"{row['params'] / 1e6:,.1f} M", f"{row['megabytes']:,.1f}"]
    cells += [_score(row["scores"].get(score), 2 if score == "perplexity" else 3) for score in scores]
    if "rival" in row and "perplexity" in scores:
        cells[5 + scores.index("perplexity")] += _OTHER_TOKENS
    cells.append(_score(row.get("perplexity_ratio"), 3))
    relative = row.get("relative_performance", {})
    cells.append(NOT_MEASURABLE if relative is None else _score(relative or None, 3))
    if "seeds" not in row:
        return cells + [DASH] * 4
    cost = [row["train_tokens"], row["train_seconds"], row["train_tokens_per_second"]]
    return cells + [f"{value:,.0f}" for value in cost] + [", ".join(map(str, row["seeds"]))]


def _majority_row(majority: dict[str, Any], scores: list[str], width: int) -> list[str]:
    """The constant answer's scores in the columns of the tasks with labels, dashes elsewhere."""
    cells = [OTHERS["majority"], *[DASH] * 4]
    for name in scores:
        task, _, metric = name.rpartition(" ")
        found = majority.get(task, {})
        figure = {"value": found[metric], "interval": found[f"{metric}_interval"]} if metric in found else None
        cells.append(_score(figure, 3))
    return cells + [DASH] * (width - len(cells))


def _score(figure: dict[str, Any] | None, digits: int) -> str:
    if figure is None:
        return DASH
    low, high = figure["interval"]
    return f"{figure['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
