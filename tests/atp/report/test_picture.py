"""The picture of quality against size: who is on it and where, what it says in words, and when there is none."""

import math

import pytest
from test_report import SUMMARY, parse, write_run

from atp.report import plots, write_report

pytest.importorskip("matplotlib")
PERPLEXITY = (
    "held-out perplexity and size: original 23.41 (22.00 – 25.00) at 538 MB; tuned dense 15.52 (14.00 – 17.00) at 538 "
    "MB; cut and tuned 30.17 (28.50 – 32.25) at 368 MB."
)
F1 = (
    "pubmedqa macro-F1 and size: original 0.317 at 538 MB; tuned dense 0.426 at 538 MB; cut and tuned 0.389 (0.301 – "
    "0.477) at 368 MB; majority label 0.237."
)


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Writes the page of a summary, with no other drawing; returns (its pictures in words, its text)."""
    for name in ("losses", "kept_share", "changed_decisions", "lasso", "widths"):
        monkeypatch.setattr(plots, name, lambda records: "")

    def write(summary):
        page, text = parse(write_report(write_run(tmp_path / "run", summary=summary)))
        words = [value for name, value in page.attributes if name == "aria-label"]
        assert page.tags.count("svg") == len(words) == page.attributes.count(("role", "img"))
        assert ("Quality and size" in text) == bool(words)
        return words, text

    return write


def without(model, summary=SUMMARY):
    names = ("perplexity", "perplexity_interval", "pubmedqa", "megabytes")
    return summary | {name: {key: v for key, v in summary[name].items() if key != model} for name in names}


def test_each_score_has_a_picture_that_tells_what_it_shows(told):
    words, text = told(SUMMARY)
    assert words == [F1, PERPLEXITY]
    assert "Size and held-out perplexity: lower is better; bars are 95 % intervals." in text
    assert "Size and pubmedqa macro-F1: higher is better; bars are 95 % intervals." in text
    words, text = told(SUMMARY | {"tasks": [], "perplexity_interval": {"original": [math.nan, 3.0], "final": None}})
    assert "original 23.41 at 538 MB" in words[0] and "lower is better. " in text, "without any interval"
    words, text = told(without("tuned_dense"))
    assert len(words) == 2 and not any("dense" in line for line in words) and "damaged" not in text
    recorded = {"command": "atp demo", "perplexity": 16.0625, "perplexity_interval": None, "tasks": {}}
    words, _ = told(without("tuned_dense") | {"recorded_dense": recorded})
    assert "tuned dense (recorded) 16.06 at 538 MB" in words[1] and "recorded" not in words[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"megabytes": {}},
        {"megabytes": {"original": 5.0}},
        {"perplexity": {}, "tasks": []},
        without("final"),
        without("original"),
        {"perplexity": {"original": 3.0, "final": math.nan}, "tasks": []},
        {"perplexity": {"original": math.inf, "final": 2.0}, "tasks": []},
        {"perplexity": {"original": None, "final": 2.0}, "pubmedqa": {"original": {}, "final": {}}},
    ],
)
def test_there_is_no_picture_without_both_ends(told, changes):
    words, _ = told(SUMMARY | changes)
    assert words == []


def test_points_lie_where_the_summary_says(monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda own, *where, **how: (drawn.append(own), save(own, *where, **how)))
    points = {"original": (538.0, 23.0, 22.0, 25.0), "cut and tuned": (368.0, 300.0, 280.0, 320.0)}
    assert plots.against_size(points, 9.5, "perplexity").startswith("<svg")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    bars = [line for name, line in lines.items() if name.startswith("_")]
    assert lines["original"] == [[538, 23]] and lines["cut and tuned"] == [[368, 300]]
    assert bars == [[[538, 22], [538, 25]], [[368, 280], [368, 320]]]
    assert {y for _, y in lines["majority label"]} == {9.5}
    assert axes.get_xlim()[0] == 0 and axes.get_yscale() == "log", "shares can be seen, and a fivefold loss too"
