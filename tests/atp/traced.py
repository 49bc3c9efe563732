"""Where the figures on a run's page come from: numbers in its text that no record of the run holds."""

import re
import statistics
from html.parser import HTMLParser
from itertools import groupby

NUMBER = re.compile(r"(?<![\w.-])-?\d[\d\u202f]*(?:\.\d+)?(?:e[-+]\d+)?(?!\w)")
RATES = ("prefill_tokens_per_second", "decode_tokens_per_second")
# What a page says of every run alike, and no run has measured.
FIXED = (
    "95 %",  # of the bootstrap intervals
    "loss, first 10", "loss, last 10",  # columns, whose cells are means of that many records
    "1 is certainty", "1 is perfect",  # the ends of two scales, in the terms
    "weights in 8 bits",  # how to export
)  # fmt: skip


class _Texts(HTMLParser):
    """The texts of a page, and the words that stand for its pictures; not the scales of their axes, nor the style."""

    def __init__(self):
        super().__init__()
        self.found, self.hidden = [], None

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name == "aria-label"]
        if self.hidden is None and tag in ("svg", "style"):
            self.hidden = tag

    def handle_endtag(self, tag):
        if tag == self.hidden:
            self.hidden = None

    def handle_data(self, data):
        if self.hidden is None and data.strip():
            self.found.append(data.strip())


def untraced(page, run):
    """The numbers on a page that neither stand in the run's records nor follow from them.

    run: `RunFiles`. Texts that are in a record word for word (names, prompts, answers, the config) are quotes, whose
    numbers are nobody's figures.
    """
    texts = _Texts()
    texts.feed(page)
    figures, quotes = _leaves([run.summary, run.certificate])
    figures += _derived(run) + [float(quote) for quote in quotes if NUMBER.fullmatch(quote)]
    quotes = {run.name, run.config.strip(), *FIXED, *quotes}
    quotes = sorted((q for q in quotes if re.search(r"\d", q) and not NUMBER.fullmatch(q)), key=len, reverse=True)
    quoted = re.compile("|".join(rf"(?<!\w){re.escape(quote)}(?!\w)" for quote in quotes))
    missing = []
    for text in texts.found:
        text = quoted.sub(" ", text)
        for match in NUMBER.finditer(text):
            if not any(_is(match[0], text[match.end() :], figure) for figure in figures):
                missing.append((match[0], text[:80]))
    return missing


def _is(shown, after, figure):
    """Whether a number on the page is a figure, as it is rounded there. after: the text that follows."""
    scale = 100 if after.startswith("%") else 1e-6 if re.match(r"( of [-\d.e\u202f]+)? (M\b|million)", after) else 1
    mantissa, _, exponent = shown.replace("\u202f", "").partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(f"{mantissa}e{exponent or 0}") - figure * scale) <= 0.5 * last * (1 + 1e-9)


def _leaves(value):
    """(numbers, texts) anywhere in nested records; keys are texts."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list):
        return ([value] if isinstance(value, (int, float)) else []), ([value] if isinstance(value, str) else [])
    parts = [_leaves(inner) for inner in value]
    return [n for numbers, _ in parts for n in numbers], [t for _, texts in parts for t in texts]


def _derived(run):
    """Figures of the page that follow from others, or from many of them."""
    summary = run.summary
    found = [1.0]  # the share of the decoder of models that are whole
    if "params_after" in summary:
        found.append(summary["params_after"] / summary["params_before"])
    speed = summary.get("speed", {})
    if {"original", "final"} <= speed.keys():
        found += [speed["final"][key] / speed["original"][key] for key in RATES if key in speed["original"]]
    seconds = summary.get("seconds", {})
    found.append(2 * seconds.get("total", 0) - sum(seconds.values()))  # what lies between the phases
    for _, records in groupby(run.metrics, key=lambda record: record["phase"]):
        records = list(records)
        losses = [record["loss"] for record in records]
        found += [
            records[0]["step"],
            records[-1]["step"],
            statistics.fmean(losses[:10]),
            statistics.fmean(losses[-10:]),
        ]
        found.append(statistics.median(record["tokens_per_second"] for record in records))
    # decisions.json lists what is kept of each layer; the table of widths numbers the layers and counts.
    layers = run.decisions.get("layers", [])
    found += [*range(len(layers)), *(len(kept) for layer in layers for kept in layer.values())]
    return found + _leaves(run.decisions.get("sizes", {}))[0]
