"""The report: everything a run left is on the page, escaped, and a partial run gives a partial page."""

import json
import re
from html.parser import HTMLParser

import pytest

from atp.cli.console import console
from atp.ground.errors import InputError
from atp.report import plots, write_report
from atp.report.terminal import show
from atp.report.text import number

VOID = {"meta", "br", "use", "path"}


class Structure(HTMLParser):
    """Visible text, tags and attributes; fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def parse(path):
    structure = Structure()
    structure.feed(path.read_text(encoding="utf-8"))
    assert not structure.open
    return structure, " ".join(" ".join(structure.text).split())


def metrics():
    for step in range(1, 61):
        phase = "search" if step <= 25 else "settle" if step <= 30 else "tune"
        record = {"step": step, "phase": phase, "loss": 3.5 - step / 100, "lr": 1e-3, "tokens_per_second": 500.0 + step}
        if phase == "search":
            record |= {
                "decision_loss": 3.6 - step / 90, "lasso": 10.0 / step, "keep": 1 - 0.4 * step / 25,
                "target_keep": 1 - 0.4 * step / 25, "changed": 0.1 / step,
            }  # fmt: skip
        yield record


SUMMARY = {
    "target_keep": 0.6, "keep_decoder": 0.5998, "keep_total": 0.684, "params_before": 134515008,
    "params_after": 92016384, "perplexity": {"original": 23.41, "tuned_dense": 15.52, "final": 30.17},
    "perplexity_interval": {"original": [22.0, 25.0], "tuned_dense": [14.0, 17.0], "final": [28.5, 32.25]},
    "tasks": ["pubmedqa"], "relative_performance": 0.913, "relative_performance_interval": [0.821, 1.002],
    "pubmedqa": {
        "original": {"accuracy": 0.48, "macro_f1": 0.317}, "tuned_dense": {"accuracy": 0.61, "macro_f1": 0.426},
        "final": {"accuracy": 0.57, "macro_f1": 0.389, "macro_f1_interval": [0.301, 0.477]},
    },
    "majority": {"pubmedqa": {"label": "yes", "of": "train", "accuracy": 0.5525, "accuracy_interval": [0.43, 0.68],
                              "macro_f1": 0.2371, "macro_f1_interval": [0.197, 0.284], "n": 50}},
    "answers": {"task": "pubmedqa", "prompt": "Abstract: walks.\nAnswer:", "truth": "maybe", "chosen": "Chosen so.",
                "models": {"original": "no", "tuned_dense": "yes", "final": "maybe"}},
    "speed": {
        "original": {"prefill_tokens_per_second": 1800.4, "decode_tokens_per_second": 40.0},
        "final": {"prefill_tokens_per_second": 2512.8, "decode_tokens_per_second": 52.0},
    },
    "megabytes": {"original": 538.06, "final": 368.07},
    "train_tokens_per_second": {"dense_lora": 611.0, "search": 402.0, "tune": 866.0},
    "seconds": {"search": 120.0, "settle": 9.0, "cut": 1.5, "tune": 110.0, "total": 777.0},
    "seed": 7, "versions": {"torch": "2.13.0"}, "command": "atp demo", "data": {"train": "0a1b2c"},
}  # fmt: skip
CERTIFICATE = {"masked_vs_cut": 2.4e-6, "cut_vs_reloaded": 0.0, "removed_lora_norm": 0.0, "merge_error": 0.98,
               "rounding_gap": 3e-7, "dtype": "float32", "limits": {"masked_vs_cut": 1e-4}}  # fmt: skip
DECISIONS = {
    "space": "head_dim", "sizes": {"qk": 32, "mlp": 96},
    "layers": [{"qk": list(range(16)), "mlp": list(range(48))}, {"qk": list(range(32)), "mlp": [3]}],
}  # fmt: skip


def write_run(folder, **changes):
    folder.mkdir(exist_ok=True)
    contents = {"summary": SUMMARY, "certificate": CERTIFICATE, "decisions": DECISIONS} | changes
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics()))
    (folder / "config.yaml").write_text("seed: 7\nmodel:\n  path: somewhere\n")
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(structure, text, source) of the page of a whole run, with its drawings."""
    run = write_run(tmp_path_factory.mktemp("whole") / "run")
    data = "data:\n  recipe: health-mini\noutput_dir: runs/mine\n"
    (run / "config.yaml").write_text(f"seed: 7\nmodel:\n  path: some/where\n{data}")
    path = write_report(run)
    assert path == run / "report.html" and not list(run.glob("*.tmp"))
    first = path.read_bytes()
    assert write_report(run).read_bytes() == first, "the same run gives the same page"
    return *parse(path), first.decode()


def test_the_whole_page_shows_every_figure(whole):
    page, text, _ = whole
    for figure in ("92.02 M", "134.52 M", "68.4%", "60.0%", "23.41", "15.52", "30.17", "0.426", "1.30 ×", "2 512.8",
                   "866", "777", "atp demo", "2.13.0", "0a1b2c", "path: some/where", "qk (of 32)"):  # fmt: skip
        assert figure in text, figure
    assert "missing" not in text and "FAIL" not in text and text.count("pass") == 5
    assert (
        "some/where was tuned and cut in one run on health-mini: 92.0 of 134.5 million parameters are left, 60% of the "
        "decoder, in 368 instead of 538 MB. Its macro-F1 in pubmedqa is 0.389 (original 0.317, tuned dense 0.426, "
        "majority label 0.237). Its perplexity on held-out text is 30.17 (original 23.41, tuned dense 15.52). On the "
        "machine of the run it reads 1.40 times and writes 1.30 times as fast as the original. parameters"
    ) in text
    assert "licence" not in text, "it is not known"
    assert "atp chat runs/mine" in text and "runs/mine/model/README.md" in text and "KV group A key and value" in text
    assert "loading, scoring, export – 536 total – 777" in text, "777 - 120 - 9 - 1.5 - 110"
    assert "0.552 (0.430 – 0.680)" in text and text.count("0.237") == 3, "in words, on the card and in the table"
    assert "Majority label of pubmedqa: always 'yes', the most frequent answer of the training questions." in text
    shown = "Chosen so. Abstract: walks. Answer: true answer maybe original no tuned dense yes cut and tuned maybe"
    assert shown in text and "pre" in page.tags
    alone = "tuning alone takes the whole model from"
    assert f"Pubmedqa macro-F1: {alone} 0.317 to 0.426, tuning and cutting to 0.389." in text
    assert f"Held-out perplexity: {alone} 23.41 to 15.52, tuning and cutting to 30.17." in text


def test_the_page_needs_nothing_from_outside_perplexity_stands_below_tasks_and_plots_take_its_colours(whole):
    page, text, source = whole
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    targets = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert all(target.startswith("#") for target in targets)
    assert not re.search(r"@import|url\((?!#)", source)
    assert 0 < text.index("pubmedqa macro-F1 ↑") < text.index("held-out perplexity ↓") < text.index("share of decoder")
    told = [value for name, value in page.attributes if name == "aria-label"]
    assert [line.startswith("pubmedqa") for line in told[:2]] == [True, False]
    assert text.index("pubmedqa macro-F1, cut") < text.index("perplexity, cut"), "on the cards"
    pytest.importorskip("matplotlib")
    assert page.tags.count("svg") == 7
    drawn = source[source.index("<svg") :]
    assert "var(--series-1)" in drawn and "currentColor" in drawn and not re.search(r"#0[123]0[123]0\d", drawn)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


DENSE = {key: {k: v for k, v in SUMMARY[key].items() if k != "tuned_dense"} for key in ("perplexity", "pubmedqa")}
TIMED = SUMMARY["speed"]["original"] | {"prefill_tokens_per_second_interval": [1790.0, 1811.5], "speed_repeats": 3}
# What a summary says otherwise, or a certificate, what the page then says, and what it does not.
SAID = {
    "licence": (
        {"license": "apache-2.0 <b>"},
        ["The licence of the source model, apache-2.0 <b>, and those of the data apply to it too. parameters"], [],
    ),
    "a baseline": ({"method": "slicegpt"}, ["somewhere was cut by slicegpt, then tuned: 92.0 of"], ["Use it"]),
    "resumed": ({"seconds": SUMMARY["seconds"] | {"total": 50.0}}, ["total – 50"], ["loading"]),
    "nothing measured": (
        {"relative_performance": None, "relative_performance_interval": None,
         "not_measurable": {"pubmedqa macro_f1": "0.239 is not above 0.237"}},
        ["relative performance not measurable the tuned dense model does not clearly beat the majority label",
         "Relative performance in pubmedqa macro_f1 is not measurable: 0.239 is not above 0.237."], [],
    ),
    "recorded": (
        DENSE | {"recorded_dense": {"command": "atp demo x", "perplexity": 16.0625, "perplexity_interval": None,
                                    "tasks": {"pubmedqa": {"accuracy": 0.615, "macro_f1": 0.401}}}},
        ["original cut and tuned tuned dense (recorded) majority label pubmedqa accuracy", "16.06", "0.615",
         "Tuned dense (recorded): not part of this run, but what `atp demo x` gave earlier."], ["15.52"],
    ),
    "timed": (
        {"speed": SUMMARY["speed"] | {"original": TIMED}},
        ["prefill, tokens/s ↑ 1 800.4 (1 790.0 – 1 811.5) – 2 512.8"], [],
    ),
    "without dense": (
        DENSE, ["evaluation.dense_baseline=true also tunes the whole model"], ["tuning alone takes"],
    ),
    "a baseline without dense": (DENSE | {"method": "slicegpt"}, [], ["tuning alone takes", "dense_baseline"]),
    "without a final score": (DENSE | {"perplexity": {"original": 2.0}}, [], ["tuning alone takes", "dense_baseline"]),
    # What custom data without labels is called; its scores are no shown question.
    "a task called answers": (
        {"tasks": ["answers"], "answers": {"original": {"rouge1": 0.25}, "final": {"rouge1": 0.5}}},
        ["answers ROUGE-1"], ["damaged", "Answers to one"],
    ),
    "no samples": ({"samples": []}, ["23.41"], ["side by side", "The section on samples is left out"]),
    "damaged samples": ({"samples": 3}, ["23.41", "The section on samples is left out"], ["side by side"]),
    "half a sample": ({"samples": [{"prompt": "x"}]}, ["The section on samples is left out"], ["side by side"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_a_summary_says_is_said_on_the_page(tmp_path, case, undrawn):
    changes, said, unsaid = SAID[case]
    page, text = parse(write_report(write_run(tmp_path / "run", summary=SUMMARY | changes)))
    assert [sentence for sentence in said if sentence not in text] == []
    assert [sentence for sentence in unsaid if sentence in text] == []
    assert "svg" not in page.tags and "pip install matplotlib" in text and "qk (of 32)" in text, "the tables stay"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("masked_vs_cut", 0.0011), ("removed_lora_norm", 1e-12), ("cut_vs_reloaded", float("nan")),
        ("merge_error", 1.01), ("merge_error", None),
    ],
)  # fmt: skip
def test_certificate_fails_above_its_limit(tmp_path, key, value, undrawn):
    _, text = parse(write_report(write_run(tmp_path / "run", certificate=CERTIFICATE | {key: value})))
    assert text.count("FAIL") == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", None, "metrics.jsonl is missing"), ("decisions.json", None, "decisions.json is missing"),
        ("certificate.json", None, "certificate.json is missing"), ("config.yaml", None, "config.yaml is missing"),
        ("summary.json", '{"perplexity": {', "summary.json is damaged"),
        *[("config.yaml", content, "The model was tuned and cut in one run: 92.0 of")
          for content in ("", "- a list", "model: [", "model: 3\ndata: x\noutput_dir: [1]\n")],
    ],
)  # fmt: skip
def test_a_missing_or_damaged_file_leaves_the_rest(tmp_path, name, content, said, undrawn):
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    _, text = parse(write_report(run))
    assert said in text and ("Certificate" in text) == (name != "certificate.json")
    assert "30.17" in text or name == "summary.json"


def test_a_run_without_a_summary_shows_what_there_is(tmp_path, undrawn):
    run = write_run(tmp_path / "run")
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 61, "pha')
    config = (run / "config.yaml").rename(tmp_path / "config.yaml")
    _, text = parse(write_report(run))
    assert "as ATPTrainer leaves a folder" in text and "atp.Run(config).execute() does all" in text
    assert "did not finish" not in text and "--resume" not in text and "Certificate" in text
    config.rename(run / "config.yaml")
    for name in ("certificate.json", "decisions.json"):
        (run / name).unlink()
    qa = {"accuracy": 0.5, "macro_f1": 0.437}
    scores = {"perplexity": 23.41, "tasks": {"qa": qa}, "size": {"params": 9, "megabytes": 36.0}}
    (run / "evaluation.json").write_text(json.dumps({"original": scores, "dense_lora": {"seconds": 1.0}}))
    _, text = parse(write_report(run))
    assert "did not finish" in text and "1 unreadable line" in text
    assert "23.41" in text and "qa macro-F1 ↑ 0.437" in text and "search" in text and "Certificate" not in text


@pytest.mark.timeout(20)
def test_records_of_many_structures_take_no_time(tmp_path, undrawn):
    sizes = {f"part {n}": 4 for n in range(500)}
    decisions = {"space": "x", "sizes": sizes, "layers": [dict.fromkeys(sizes, [1])] * 3}
    _, text = parse(write_report(write_run(tmp_path / "run", decisions=decisions)))
    assert "part 499 (of 4)" in text


SAMPLES = [
    {"prompt": "Is <b>this</b> bold? 😀", "reference": "no & <i>yes</i>",
     "models": {"original": "<script>alert(1)</script>", "final": ""}},
    {"prompt": "שלום, מה שלומך?", "reference": "טוב", "models": {"original": "👩‍👩‍👧 family", "final": "مرحبا"}},
]  # fmt: skip


def test_held_out_prompts_stand_beside_their_answers(tmp_path, undrawn):
    page, text = parse(write_report(write_run(tmp_path / "run", summary=SUMMARY | {"samples": SAMPLES})))
    shown = (
        "Is <b>this</b> bold? 😀 reference no & <i>yes</i> original <script>alert(1)</script> cut and tuned (nothing) "
        "שלום, מה שלומך? reference טוב original 👩‍👩‍👧 family cut and tuned مرحبا"
    )
    assert shown in text and not {"script", "i"} & set(page.tags) and page.tags.count("h3") == 6
    assert page.attributes.count(("dir", "auto")) == 8, "each text has its own direction"


def test_text_of_the_run_is_escaped(tmp_path, undrawn):
    evil = "<script>alert('x')</script>&\"<b>"
    changed = SUMMARY | {"command": evil, "versions": {evil: evil}, "data": {"train": evil}, "seed": evil}
    changed["train_tokens_per_second"] = {evil: 1.0}
    decisions = DECISIONS | {"space": evil, "sizes": {evil: 4}, "layers": [{evil: [1]}]}
    run = write_run(tmp_path / "a<script>b", summary=changed, decisions=decisions, certificate={evil: evil})
    (run / "config.yaml").write_text(evil)
    record = {"step": 1, "phase": evil, "loss": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    structure, text = parse(write_report(run))
    assert "script" not in structure.tags
    assert text.count(evil) >= 7 and "a<script>b" in text


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


ODD = [None, "<i>", -1, 1e308, [], {}, [[]], {"a": [1, None]}, True, "\ud800", 10**400, [1, 2, 3]]


def test_any_other_value_anywhere_leaves_a_page(tmp_path, undrawn):
    for name, content in {"summary": SUMMARY, "certificate": CERTIFICATE, "decisions": DECISIONS}.items():
        for number_, path in enumerate(places(content)):
            if name == "decisions" and len(path) > 4:
                continue
            run = write_run(tmp_path / "run", **{name: replaced(content, path, ODD[number_ % len(ODD)])})
            structure, text = parse(write_report(run))
            assert "i" not in structure.tags, path
            assert "Settings" in text or "damaged" in text or "missing" in text, path


def test_a_damaged_record_costs_its_section_and_says_so(tmp_path, undrawn):
    run = write_run(tmp_path / "run", summary=SUMMARY | {"tasks": ["absent"], "perplexity": 3})
    record = {"step": 10**300, "phase": "$\\frac$ <b>", "loss": 1.0}
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(record) + "\n" + '{"step": Infinity, "phase": 1}\n' + '{"step": "7", "phase": {}}\n')
    _, text = parse(write_report(run))
    assert "The section on headline is left out: the run's records are damaged" in text
    assert "The section on scores is left out" in text and "Widths by layer" in text and "Certificate" in text
    assert "1 unreadable line" in text
    (run / "evaluation.json").write_text(json.dumps({"original": 3, "final": {"perplexity": 1.0, "tasks": [1]}}))
    (run / "summary.json").write_text("[" * 10**5)
    _, text = parse(write_report(run))
    assert "summary.json is damaged" in text and "did not finish" in text


def test_dollars_in_a_name_are_no_formula(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "$\\frac$", "loss": 1.0}) + "\n")
    _, text = parse(write_report(run))
    assert "damaged" not in text and "$\\frac$" in text


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_for_people():
    assert number(134515008) == "134\u202f515\u202f008"
    assert number(1234.567, 1) == "1\u202f234.6"
    assert number(2.4e-6, 3) == "2.4e-06" and number(0.0, 3) == "0"
    assert number(None) == "–" and number(float("nan")) == "nan" and number("<") == "<"


def test_no_drawing_shows_a_formula(tmp_path):
    """Of numbers over many decades and within one; `text.parse_math` is off, so a formula shows as its source."""
    pytest.importorskip("matplotlib")
    wide, narrow = (1.0, 1e-3, 1e6), (37.0, 36.0, 38.0)
    for values in (wide, narrow):
        panels = {"perplexity": {"ATP": values, "random": values[::-1]}}
        points = {name: (size, *values) for name, size in (("original", 538.0), ("cut and tuned", 3.7e7))}
        steps = [{"step": 10**6 * n, "phase": "tune", "loss": v, "lasso": v} for n, v in enumerate(values)]
        for svg in (
            plots.intervals(panels), plots.against_size(points, values[2], "perplexity"), plots.lasso(steps),
            plots.losses(steps),
        ):  # fmt: skip
            assert "</svg>" in svg and "$" not in svg and "mathdefault" not in svg


def test_a_curve_has_plain_numbers_on_its_log_axis(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib.figure")
    figures, save = [], matplotlib.Figure.savefig
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda own, path: (figures.append(own), save(own, path)))
    line = [(0.5, 37.0, 36.0, 38.0), (0.8, 49.0, 48.0, 52.0)]
    plots.curves_png(tmp_path / "curve.png", {"custom": {"ATP": line}}, "share", "perplexity")
    axis = figures[0].axes[0].yaxis
    labels = [tick.label1.get_text() for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
    assert {"40", "50"} <= set(labels) and not any("$" in label for label in labels)


def test_control_characters_are_shown_on_the_page_and_the_terminal(tmp_path, capsys):
    hostile, shown = "\x00\x1b[2J\x9b1m\u202e\u2066z", r"\x00\x1b[2J\x9b1m\u202e\u2066z"
    answers = SUMMARY["answers"] | {"prompt": hostile, "models": {"original": hostile + "\r", "final": "maybe"}}
    sample = {"prompt": hostile, "reference": "two\nlines", "models": {"final": hostile}}
    write_run(tmp_path, summary=SUMMARY | {"answers": answers, "command": hostile, "samples": [sample]})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.replace("\n", "").replace("\u202f", "").isprintable() and page.count(shown) >= 5
    assert "two\nlines" in page
    show(SUMMARY | {"answers": answers, "certificate": CERTIFICATE}, console)
    out = capsys.readouterr().out
    assert shown + r"\r" in out.replace("\n", "") and out.replace("\n", "").isprintable()
