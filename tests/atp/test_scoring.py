"""`atp eval` end to end on a tiny model: suites, intervals, relative performance, refusals before the model runs."""

import json
import sys
from dataclasses import replace

import pytest
import yaml
from rich.console import Console
from tiny_command import read, start
from tiny_folder import save

from atp.cli.scoring import Scoring, flat_scores, score_folder
from atp.ground.errors import InputError
from atp.ground.listing import runs_below
from atp.report import terminal
from atp.report.files import read_run

WORDS = "the cat sat on a mat is it there ? yes no".split()
OPTIONS = Scoring(suite="", documents=4, length=16, questions=6, precision="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    for seed in (0, 1):
        save(folder / f"model{seed}", words=WORDS, seed=seed, **sizes, eos_token_id=1, bos_token_id=1)
    texts = [f"{'the cat ' * n}sat on a mat ? is it there ?" for n in range(30)]
    rows = [{"prompt": text, "completion": f" {'no' if n % 3 else 'yes'}"} for n, text in enumerate(texts)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def scored(folder, seed=0, **options):
    return score_folder(str(folder / f"model{seed}"), replace(OPTIONS, suite=str(folder / "data.jsonl"), **options))


def test_a_file_of_labelled_questions(folder):
    scores = scored(folder, labels=("yes", "no"))
    qa = scores["tasks"]["qa"]
    assert qa["n"] == 6 and [truth for truth, _ in qa["items"]] == ["yes", "no", "no"] * 2
    assert qa["accuracy"] == sum(a == b for a, b in qa["items"]) / 6
    assert scores["documents"] == 4 and scores["stride"] == 8
    assert scores["settings"]["precision"] == "float32"
    # The file has no training part. Its first six answers are yes, no, no, yes, no, no.
    found = scores["majority"]["qa"]
    assert (found["label"], found["of"], found["accuracy"]) == ("no", "test", pytest.approx(4 / 6))
    flat = {name: (value, interval) for name, value, interval in flat_scores(scores)}
    assert flat["majority qa accuracy"][0] == found["accuracy"]
    assert flat["qa accuracy"] == (qa["accuracy"], qa["accuracy_interval"])
    assert flat["perplexity"][1] == scores["perplexity_interval"] and "decode_tokens_per_second" in flat
    json.dumps(scores)


def test_completions_are_generated_and_without_the_package_for_rouge_the_rest_is_scored(folder, monkeypatch):
    pytest.importorskip("rouge_score")
    answers = scored(folder, questions=2)["tasks"]["answers"]
    assert answers["n"] == 2 and 0 <= answers["rouge1"] <= 1
    for name in ("rouge_score", "rouge_score.rouge_scorer", "lm_eval"):
        monkeypatch.setitem(sys.modules, name, None)
    scores = scored(folder, questions=2)
    assert scores["tasks"] == {} and scores["perplexity"] > 1
    assert any("Not scored: answers, because ROUGE needs package rouge-score: run pip" in r for r in scores["remarks"])
    assert scored(folder, questions=2, labels=("yes", "no"))["tasks"]["qa"]["n"] == 2
    none = scored(folder, questions=0)
    assert none["tasks"] == {} and not any("Not scored" in remark for remark in none["remarks"])


def test_relative_to_the_dense_model(folder, tmp_path):
    """Untuned models give one answer to everything, so the file is made to hold a dense model that is always right."""
    options = {"labels": ("yes", "no"), "questions": 24}
    dense = scored(folder, **options)
    path = tmp_path / "dense.json"
    path.write_text(json.dumps(dense))
    same = scored(folder, **options, dense=str(path))
    assert same["relative_performance"] is None and same["perplexity_ratio"] == 1
    assert ("relative_performance", None, None) in flat_scores(same)
    (sentence,) = (remark for remark in same["remarks"] if "not measurable" in remark)
    assert sentence.startswith("Relative performance in qa macro_f1 is not measurable: the tuned dense model's")
    qa = dense["tasks"]["qa"]
    qa["items"] = [[truth, truth] for truth, _ in qa["items"]]
    path.write_text(json.dumps(dense))
    other = scored(folder, seed=1, **options, dense=str(path))
    assert other["relative_performance"] == pytest.approx(other["tasks"]["qa"]["macro_f1"] / 1)
    assert other["perplexity_ratio"] == pytest.approx(other["perplexity"] / dense["perplexity"])
    with pytest.raises(InputError, match="not scored on the same items"):
        scored(folder, **options, documents=3, dense=str(path))


def test_a_config_of_a_run_gives_the_split_of_that_run(folder, tmp_path):
    values = {
        "model": {"path": "unused"}, "output_dir": "unused", "seed": 3,
        "data": {"train": str(folder / "data.jsonl"), "labels": ["yes", "no"], "test_share": 0.2, "general_share": 0},
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    scores = score_folder(str(folder / "model0"), replace(OPTIONS, suite=str(config), questions=30))
    assert scores["tasks"]["qa"]["n"] == 6, "a fifth of 30 documents is held out"
    assert scores["majority"]["qa"]["of"] == "train"


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"perplexity": 3}', "[" * 10**5, '{"items": 1, "tasks": 2}', '{"items": [[1.0, 2]], "tasks": {}}',
     '{"items": [[1.0, 2]], "tasks": {"qa": {"items": [["yes"]]}}}'],
)  # fmt: skip
def test_scores_that_are_none_are_refused_before_the_model_runs(folder, tmp_path, monkeypatch, content):
    monkeypatch.setattr("atp.cli.scoring.evaluate_model", lambda *_, **__: pytest.fail("the model ran"))
    path = tmp_path / "dense.json"
    path.write_text(content)
    for place in (path, tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="pass a file that --output wrote"):
            scored(folder, labels=("yes", "no"), dense=str(place))


def test_windows_and_labels_that_do_not_fit_are_refused_before_the_model_runs(folder, monkeypatch):
    monkeypatch.setattr("atp.cli.scoring.evaluate_model", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(InputError, match="labels 'perhaps' and 'surely' become the same tokens"):
        scored(folder, labels=("yes", "no", "perhaps", "surely"))
    with pytest.raises(InputError, match="--length is 4096, but the model has only 2048 positions: lower --length"):
        scored(folder, length=4096)
    with pytest.raises(InputError, match="stride 16 does not fit windows of 16 tokens"):
        scored(folder, stride=16)


def test_what_there_is_less_of_than_asked_is_said(folder):
    counted = "Perplexity counts all tokens: 48 tokens in windows of 16 that start 8 apart."
    assert scored(folder)["remarks"] == [counted]
    assert scored(folder, labels=("yes", "no"), documents=31, questions=99)["remarks"][1:] == [
        "--documents is 31, but there are only 30 documents", "--questions is 99, but there are only 30 of qa",
        "Majority label of qa: always 'no', the most frequent answer of the test questions.",
    ]  # fmt: skip


def figures(scores):
    """What a run and `atp eval` must agree on: perplexity and answers, to the last digit."""
    kept = ("perplexity", "perplexity_interval", "nll", "tokens", "documents", "items", "counted", "length", "stride")
    return {name: scores[name] for name in (*kept, "tasks")}


@pytest.fixture(scope="module", params=["labels", "prompts", "text"])
def run(request, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    rows = [json.loads(line) for line in open(config.data.train, encoding="utf-8")]
    data = {} if request.param == "labels" else {"labels": []}
    if request.param == "text":
        data["train"] = str(folder / "texts.jsonl")
        texts = [json.dumps({"text": row["prompt"]}) for row in rows]
        (folder / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    scored = {"dense_baseline": False, "batch_size": 3, "windows": 5, "questions": 7}
    start(config, folder / "out", data=data, evaluation=scored, seed=3)
    return folder / "out"


def test_a_run_and_its_config_give_one_figure_and_say_what_it_counts(run, config):
    """To the digit, whether the run or its model is named, and for the model that it began with, too."""
    recorded = read(run, "evaluation.json")
    for model in (run, run / "model"):
        scores = score_folder(str(model), Scoring(suite=str(run / "config.yaml")))
        assert figures(scores) == figures(recorded["final"])
    before = score_folder(config.model.path, Scoring(suite=str(run / "config.yaml")))
    assert figures(before) == figures(recorded["original"]) != figures(recorded["final"])
    settings = scores["settings"]
    assert settings | {"precision": "float32", "seed": 3, "documents": 5, "length": 16, "stride": 16} == settings
    longer = score_folder(str(run), Scoring(suite=str(run / "config.yaml"), length=32, documents=5))
    assert longer["length"] == 32 and longer["counted"] == "all tokens", "whoever asks for other windows gets them"
    counted = "all tokens" if "texts.jsonl" in read_run(run).config else "answers"
    assert recorded["final"]["counted"] == counted
    sentence = f"Perplexity counts {counted}: {recorded['final']['tokens']:,} tokens in windows of 16."
    console = Console(width=200, record=True, markup=False, highlight=False)
    terminal.show(read(run, "summary.json"), console)
    page = (run / "report.html").read_text(encoding="utf-8")
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    for place in (console.export_text(), page, card):
        assert sentence in place
    assert f"held-out perplexity, {counted}" in page and sentence in scores["remarks"]
    (line,) = runs_below(run)
    assert line.counted == counted
