"""The majority label, and what it leaves of relative performance, in everything that a run on a tiny model writes."""

import json

import pytest
import torch
from rich.console import Console
from tiny_command import read, start
from traced import untraced

from atp.data import load_recipe
from atp.evaluation.samples import Sample, sample_answers
from atp.evaluation.scored_tasks import without_items
from atp.ground.listing import runs_below
from atp.inputs.loading import data_settings, load_tokenizer
from atp.models.load import read_model
from atp.report import terminal
from atp.report.files import read_run


@pytest.fixture
def printed():
    """Returns what the command prints at the end of a run. changes: keys of its summary that differ."""

    def show(folder, **changes):
        console = Console(width=200, record=True, quiet=False, markup=False, highlight=False)
        terminal.show(read(folder, "summary.json") | changes, console)
        return console.export_text()

    return show


@pytest.fixture
def untaught(config, tmp_path, wide_budget):
    """A run whose questions do not hold their answers, so that nothing can be learnt; it ends by showing one."""
    rows = [json.loads(line) for line in open(config.data.train, encoding="utf-8")]
    rows = [row | {"prompt": row["prompt"].rpartition(" ")[0]} for row in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data, evaluation = {"train": str(tmp_path / "data.jsonl")}, {"answers": True}
    start(config, tmp_path / "out", data=data, evaluation=evaluation)
    return tmp_path / "out"


def test_the_majority_label_is_scored_on_the_questions_of_the_models(config, finished):
    scores, summary = read(finished, "evaluation.json"), read(finished, "summary.json")
    found = scores["majority"]["qa"]
    truth = [true for true, _ in scores["final"]["tasks"]["qa"]["items"]]
    assert [true for true, _ in found["items"]] == truth and len(truth) == config.evaluation.questions
    assert found["of"] == "train" and {given for _, given in found["items"]} == {found["label"]}
    assert found["accuracy"] == truth.count(found["label"]) / len(truth)
    assert summary["majority"] == {"qa": without_items(found)}
    assert {"original", "tuned_dense", "final"} == summary["qa"].keys(), "the models' scores keep their keys"


def test_every_figure_of_the_report_is_in_the_records(finished):
    page, run = (finished / "report.html").read_text(encoding="utf-8"), read_run(finished)
    assert untraced(page, run) == [] and run.summary["certificate"] == run.certificate
    run.summary["perplexity"]["final"] += 1
    assert untraced(page, run) != []


def test_it_is_shown_by_the_command_the_report_and_the_card(finished, printed):
    printed = printed(finished)
    found = read(finished, "summary.json")["majority"]["qa"]
    sentence = f"Majority label of qa: always '{found['label']}', the most frequent answer of the training questions."
    page = (finished / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    assert sentence in printed and sentence in page
    head = next(line for line in printed.splitlines() if "majority label" in line)
    assert head.split() == ["original", "tuned", "dense", "final", "majority", "label"] or "┃" in head
    row = next(line for line in printed.splitlines() if "qa macro_f1" in line)
    assert f"{found['macro_f1']:.3f}" in row.split("│")[-2]
    assert '<th scope="col">majority label</th>' in page and f"{found['macro_f1']:.3f}" in page
    assert f"| {found['macro_f1']:.4g} |\n" in card and "| data | score | value | majority label |" in card


def test_the_command_says_whether_the_certificate_holds(finished, printed):
    found = read(finished, "summary.json")["certificate"]
    assert "certificate: pass\n" in printed(finished) and "merge error" not in printed(finished)
    failed = printed(finished, certificate=found | {"merge_error": 1.5})
    assert "certificate: FAIL: merge_error is 1.50e+00, not at most 1 (weights with the adapter merged in" in failed


def test_the_command_shows_perplexity_below_the_scores_and_speeds_with_their_intervals(finished, printed):
    shown, speed = printed(finished), read(finished, "summary.json")["speed"]["final"]
    assert 0 < shown.index("qa macro_f1") < shown.index("held-out perplexity") < shown.index("share of the decoder")
    low, high = speed["decode_tokens_per_second_interval"]
    assert f"{speed['decode_tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})" in shown
    assert "Qa macro-F1: tuning alone takes the whole model from" in shown


def test_a_run_from_python_leaves_what_the_commands_read(config, tmp_path, wide_budget):
    from atp import Run

    folder = tmp_path / "mine"
    summary = Run(config.model_copy(update={"output_dir": str(folder)}), say=lambda line: None).execute()
    assert summary == read(folder, "summary.json") and summary["command"] == "atp.Run(config).execute()"
    (line,) = runs_below(tmp_path)
    assert (line.state, line.perplexity) == ("finished", summary["perplexity"]["final"])
    assert read_run(folder).notes == []


def test_what_cannot_be_measured_is_said_everywhere(untaught, printed):
    summary, printed = read(untaught, "summary.json"), printed(untaught)
    assert summary["relative_performance"] is None and summary["ratios"] == {"qa macro_f1": None}
    sentence = f"Relative performance in qa macro_f1 is not measurable: {summary['not_measurable']['qa macro_f1']}."
    page = (untaught / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    card = (untaught / "model" / "README.md").read_text(encoding="utf-8").replace("\\", "")
    for place in (printed, page, card):
        assert sentence in " ".join(place.split())
    row = next(line for line in printed.splitlines() if "of tuned dense" in line)
    assert "not measurable" in row and "1.000" not in row


def test_held_out_prompts_are_answered_by_both_models(config, finished):
    scores, samples = read(finished, "evaluation.json"), read(finished, "summary.json")["samples"]
    tokenizer = load_tokenizer(config.model)
    trained = load_recipe(data_settings(config, tokenizer)).train
    assert len(samples) == config.evaluation.samples == 3 and "samples" not in scores["tuned_dense"]
    for place, sample in enumerate(samples):
        assert sample["prompt"] not in {example.prompt for example in trained}
        assert sample["reference"] in ("yes", "no")
        assert sample["models"] == {name: scores[name]["samples"][place] for name in ("original", "final")}
        assert sample["prompt"] in (finished / "report.html").read_text(encoding="utf-8")
    asked = [Sample(sample["prompt"], sample["reference"]) for sample in samples]
    for name, path in {"original": config.model.path, "final": finished / "model"}.items():
        model = read_model(path, dtype=torch.float32)
        assert sample_answers(model, tokenizer, asked) == [sample["models"][name] for sample in samples]


def test_no_prompts_are_answered_if_none_are_asked_for(config, tmp_path, wide_budget):
    def refuse(*arguments, **options):
        raise AssertionError("nothing is generated")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atp.evaluation.samples.generate_answers", refuse)
        summary = start(config, tmp_path / "out", evaluation={"samples": 0, "dense_baseline": False, "questions": 2})
    assert "samples" not in summary
    assert "side by side" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_question_is_shown_on_request(finished, untaught, printed):
    assert "answers" not in read(finished, "summary.json")
    assert "Answers to one test question" not in (finished / "report.html").read_text(encoding="utf-8")
    shown, scores = read(untaught, "summary.json")["answers"], read(untaught, "evaluation.json")
    lines = printed(untaught).splitlines()
    assert f"question: {shown['prompt']}" in lines and f"true answer: {shown['truth']}" in lines
    for name, label in {"original": "original", "tuned_dense": "tuned dense", "final": "cut and tuned"}.items():
        items = scores[name]["tasks"]["qa"]["items"]
        assert [shown["truth"], shown["models"][name]] in items and f"{label}: {shown['models'][name]}" in lines
    page = (untaught / "report.html").read_text(encoding="utf-8")
    assert shown["chosen"] in page and f"<pre>{shown['prompt']}</pre>" in page


def test_a_finished_run_measures_what_the_dense_model_has_learnt(finished):
    """The tiny model repeats the last word, which is the answer: far above the majority label."""
    summary = read(finished, "summary.json")
    assert summary["not_measurable"] == {} and summary["ratios"] == {"qa macro_f1": summary["relative_performance"]}
