"""Writes the tables of docs/results.md and README.md from experiments/results/*.csv.

    python experiments/results_page.py           rewrite the tables between `<!-- results: NAME -->` and `<!-- end -->`
    python experiments/results_page.py --check   change nothing; exit status 1, naming each table that differs

A cell is the mean over seeds, with the least and the most in brackets where there are several seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
RECORDED_DENSE = ROOT / "atp" / "cli" / "demo_dense.json"
PAGES = ("README.md", "docs/results.md")
PLACE = re.compile(r"(<!-- results: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
DOMAINS = ("health-mini", "legal-mini")
NOT_RUN = "not run"

Table = list[list[str]]
Scores = dict[int, float]  # of each seed

# What the arms do, in the words of the tables.
ORIGINAL, DENSE = "the original model", "tune the whole model, remove nothing"
ATP, ATP_60 = "**ATP**: decide while LoRA learns", "**ATP**, 60 % removed"
SAME = "decide on the pretrained model, same windows and refit, then tune"
GENERAL = "decide on the pretrained model, by 32 calibration windows, then tune"
FIRST = "decide on the pretrained model, then tune"
PRUNER, SLICE = "LLM-Pruner, then tune", "SliceGPT, then tune"

# Arms of experiments/quality.yaml and tasks.yaml.
DEFAULT, STATIC = "refit on 192 windows, today's damping", "static, refit on 192 windows"
DENSE_TASK, RUNNING = "dense_lora, twice the steps", "atp, running saliency"
SMALL_STEPS = "1,440 steps of 4, clipped updates"


@cache
def rows(experiment: str) -> list[dict[str, str]]:
    with (RESULTS / f"{experiment}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def scores(experiment: str, domain: str, arm: str | None, column: str = "perplexity", config: str = "") -> Scores:
    """The column's value of each seed; none for the arm None. config: where an arm was run under several settings."""
    if arm is None:
        return {}
    wanted = {"domain": domain, "arm": arm, **({"config": config} if config else {})}
    found = [row for row in rows(experiment) if all(row[key] == value for key, value in wanted.items())]
    result = {int(row["seed"]): float(row[column]) for row in found}
    if not found or len(result) < len(found):
        raise SystemExit(f"{experiment}.csv has {len(found)} rows of {wanted}, for {len(result)} seeds")
    return result


def shown(values: Scores, digits: int) -> str:
    """The mean, and the least and most of several seeds."""
    if not values:
        return NOT_RUN
    least, most = (f"{bound(values.values()):.{digits}f}" for bound in (min, max))
    middle = f"{mean(values.values()):.{digits}f}"
    return f"{middle} ({least}–{most})" if len(values) > 1 else middle


def seeds(*columns: Scores) -> str:
    """How many seeds each column has, said once where all have the same number; columns not run do not count."""
    counts = [len(values) for values in columns if values]
    return ", ".join(str(count) for count in (counts[:1] if len(set(counts)) == 1 else counts))


def of_original(experiment: str, domain: str, arm: str | None) -> str:
    return f"{next(iter(scores(experiment, domain, arm, 'original perplexity').values())):.2f}"


def on_text(arms: dict[str, str | tuple[str | None, str | None]], experiment: str = "quality") -> Table:
    """Perplexity of both domains. arms: label -> arm, or an arm for each domain."""
    pairs = {label: arm if isinstance(arm, tuple) else (arm, arm) for label, arm in arms.items()}
    whole = next(pair for pair in pairs.values() if None not in pair)
    table = [["perplexity", "seeds", "medical abstracts", "legal texts"]]
    table.append([ORIGINAL, "", *(of_original(experiment, *at) for at in zip(DOMAINS, whole, strict=True))])
    for label, pair in pairs.items():
        columns = [scores(experiment, domain, arm) for domain, arm in zip(DOMAINS, pair, strict=True)]
        table.append([label, seeds(*columns), *(shown(values, 2) for values in columns)])
    return table


def text() -> Table:
    same = "static, the default's windows, refit on 192 windows"
    arms = {ATP: DEFAULT, SAME: same, "the same, by 32 calibration windows": STATIC}
    return on_text({DENSE: (None, None), **arms, ATP_60: ("default, 60 % removed, in two rounds", None)})


def longer() -> Table:
    four = "four times the tokens"
    arms = {
        DENSE: (f"dense_lora, {four}", None),
        ATP: (f"default, {four}", f"default, {four}, refit on 192 windows"),
        GENERAL: (f"static, {four}", f"static, {four}, refit on 192 windows"),
        ATP_60: (f"default, 60 % removed, {four}", None),
    }
    return on_text(arms)


def others() -> Table:
    same = "by ATP's windows, then tune"
    arms = {
        PRUNER: "llm_pruner", f"LLM-Pruner {same}": "llm_pruner, the default's windows",
        SLICE: "slicegpt", f"SliceGPT {same}": "slicegpt, the default's windows",
    }  # fmt: skip
    return on_text({"**ATP**": DEFAULT, **arms})


def presets() -> Table:
    arms = {
        ("`quick`", "400"): DEFAULT,
        ("`standard`", "1,200"): "preset: standard, twice the windows for the refit",
        ("`thorough`", "3,600"): "preset: thorough",
    }
    table = [["preset", "steps", "perplexity of medical abstracts, seed 0"]]
    return table + [[*label, f"{scores('quality', DOMAINS[0], arm)[0]:.2f}"] for label, arm in arms.items()]


def learned() -> Table:
    return on_text(
        {
            "saliency, with an earlier refit": "atp",
            "learned decisions": "learned decisions",
            "saliency, with an earlier refit, 307,200 tokens, learning rate 2e-3": "default, four times the tokens",
            "`preset: paper`, 288,000 tokens, learning rate 1e-4": "preset: paper, 1,500 steps of one window",
        }
    )


def lasso() -> Table:
    return on_text(
        {
            "learned decisions with the group lasso": "group lasso in search and settle",
            "learned decisions without it": "none at all",
        },
        "lora_aware",
    )


def tasks() -> Table:
    domain, column = "privacy-mini", "privacy macro_f1"
    arms = [
        (DENSE, "nothing", DENSE_TASK),
        (ATP, "40 %", f"atp, {SMALL_STEPS}"),
        (FIRST, "40 %", f"static, {SMALL_STEPS}"),
        (PRUNER, "40 %", f"llm_pruner, {SMALL_STEPS}"),
        ("**ATP**", "60 %", f"atp, 60 % removed, {SMALL_STEPS}"),
        (FIRST, "60 %", f"static, 60 % removed, {SMALL_STEPS}"),
        ("ATP by `atp init --keep 0.4`", "60 %", "atp init --keep 0.4"),
    ]
    dense = scores("tasks", domain, DENSE_TASK, column)
    table = [["privacy questions", "removed", "seeds", "macro-F1", "share of the tuned whole model"]]
    for label, share, arm in arms:
        values = scores("tasks", domain, arm, column)
        kept = "1" if arm == DENSE_TASK else shown(_shares(values, dense), 3)
        table.append([label, share, str(len(values)), shown(values, 3), kept])
    majority = scores("tasks", domain, DENSE_TASK, f"{column} majority label")[0]
    return [*table[:1], ["always the majority label", "", "", f"{majority:.3f}", ""], *table[1:]]


def more_tasks() -> Table:
    satire, privacy, twice = "satire macro_f1", "privacy macro_f1", "twice the steps"
    arms = [  # config: two draws of the test questions
        ("headlines: ATP", "40 %", "satire-mini", satire, "atp", "dense_lora", ""),
        ("headlines: LLM-Pruner", "40 %", "satire-mini", satire, "llm_pruner", "dense_lora", ""),
        ("headlines: ATP", "60 %", "satire-mini", satire, "atp, 60 % removed", "dense_lora", ""),
        ("all privacy questions: ATP", "40 %", "privacy-all", privacy, f"atp, {twice}", DENSE_TASK, "1d09f206"),
        (
            "all privacy questions: ATP",
            "60 %",
            "privacy-all",
            privacy,
            f"atp, 60 % removed, {twice}",
            DENSE_TASK,
            "e58601d2",
        ),
    ]
    table = [["task", "removed", "seeds", "tuned whole model", "cut model", "share"]]
    for label, removed, domain, column, arm, whole, config in arms:
        values, dense = (scores("tasks", domain, one, column, config) for one in (arm, whole))
        means = (f"{mean(one.values()):.3f}" for one in (dense, values))
        table.append([label, removed, str(len(values)), *means, shown(_shares(values, dense), 3)])
    rouge = [f"xsum rouge{kind}" for kind in "12L"]
    cut, whole = ([scores("summaries", "news-mini", arm, one)[0] for one in rouge] for arm in (RUNNING, "dense_lora"))
    cells = ("/".join(f"{value:.3f}" for value in one) for one in (whole, cut))
    share = mean(value / dense for value, dense in zip(cut, whole, strict=True))
    return [*table, ["summaries, ROUGE-1/2/L: ATP", "40 %", "1", *cells, f"{share:.3f}"]]


def _shares(values: Scores, dense: Scores) -> Scores:
    """Each seed's score over that of the tuned whole model of the same seed."""
    return {seed: value / dense[seed] for seed, value in values.items()}


@cache
def _demo() -> dict[str, dict[str, str]]:
    return {row["figure"]: row for row in rows("demo") if row["command"] == "make demo"}


def _figure(name: str) -> str:
    return _demo()[name]["value"]


def _dense_demo() -> tuple[str, str]:
    """Macro-F1 and perplexity of the demo's tuned whole model."""
    record = json.loads(RECORDED_DENSE.read_text(encoding="utf-8"))
    return f"{record['tasks']['satire']['macro_f1']:.3f}", f"{record['perplexity']:.2f}"


def _demo_sizes() -> Table:
    size = [f"{_figure(f'{model} size')} MB" for model in ("original", "final")]
    speed = [f"{_figure(f'{model} prefill')} / {_figure(f'{model} decode')}" for model in ("original", "final")]
    return [
        ["size in float32", size[0], size[0], size[1]],
        ["prefill / decode on two CPU cores, tokens per second", speed[0], "as the original", speed[1]],
    ]


def demo() -> Table:
    macro_f1, perplexity = _dense_demo()
    return [
        ["seed 0", "original", "tuned whole model", "**ATP**"],
        ["macro-F1", _figure("original macro_f1"), macro_f1, _figure("final macro_f1")],
        ["share of the tuned whole model's, 3 seeds", "", "1", _by_seed("share of dense by seed")],
        ["perplexity of the answers", _figure("original perplexity"), perplexity, _figure("final perplexity")],
        *_demo_sizes(),
        ["largest logit change at the cut, share of the scale", "", "", _figure("masked vs cut")],
    ]


def _by_seed(name: str) -> str:
    return shown({int(row["seed"]): float(row["value"]) for row in rows("demo") if row["figure"] == name}, 3)


def readme() -> Table:
    four = "four times the tokens"
    label = f"satire or news, macro-F1 (majority label: {_figure('majority label macro_f1')})"
    table = [
        ["SmolLM2-135M", "original", "LoRA-tuned", "**ATP, 40 % of the decoder removed**"],
        *_demo_sizes(),
        [label, _figure("original macro_f1"), *(_by_seed(f"{model} macro_f1 by seed") for model in ("dense", "final"))],
    ]
    texts = [
        ("perplexity of medical abstracts, 76,800 training tokens", DOMAINS[0], DEFAULT, None),
        ("the same, 307,200 training tokens", DOMAINS[0], f"default, {four}", f"dense_lora, {four}"),
        ("perplexity of legal texts, 76,800 training tokens", DOMAINS[1], DEFAULT, None),
    ]
    for label, domain, arm, dense in texts:
        columns = (scores("quality", domain, one) for one in (dense, arm))
        table.append([label, of_original("quality", domain, arm), *(shown(values, 2) for values in columns)])
    return table


TABLES: dict[str, Callable[[], Table]] = {
    "text": text, "longer": longer, "others": others, "presets": presets, "learned": learned,
    "lasso": lasso, "tasks": tasks, "more-tasks": more_tasks, "demo": demo, "readme": readme,
}  # fmt: skip


def markdown(table: Table) -> str:
    lines = [f"|{' | '.join(cells)}|\n".replace("|  ", "| ") for cells in table]
    return "".join(["\n", lines[0], "|" + "---|" * len(table[0]) + "\n", *lines[1:], "\n"])


def rewritten(page: str) -> str:
    """The page's text with the tables of today's CSV files between its marks."""
    return PLACE.sub(lambda place: f"{place[1]}{markdown(TABLES[place[2]]())}{place[4]}", page)


def differing(page: str) -> Iterator[str]:
    """Names of the page's tables that are not those of today's CSV files."""
    for place in PLACE.finditer(page):
        if place[2] not in TABLES or place[3] != markdown(TABLES[place[2]]()):
            yield place[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a table differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/ (default: the clone)")
    options = parser.parse_args()
    pages = {name: (options.root / name).read_text(encoding="utf-8") for name in PAGES}
    if not options.check:
        for name, page in pages.items():
            (options.root / name).write_text(rewritten(page), encoding="utf-8")
        return
    wrong = [f"{name}: the table `{table}` differs" for name, page in pages.items() for table in differing(page)]
    there = {place[2] for page in pages.values() for place in PLACE.finditer(page)}
    wrong += [f"no page has the table `{table}`" for table in TABLES if table not in there]
    if wrong:
        sys.exit("\n".join([*wrong, "Write the tables anew: python experiments/results_page.py"]))


if __name__ == "__main__":
    main()
