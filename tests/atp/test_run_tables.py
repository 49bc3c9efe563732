"""The majority label, and what it leaves of relative performance, in everything that a run on a tiny model writes."""

import json

import pytest
import torch
from rich.console import Console
from tiny_command import read, start

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
def untaught(config, tmp_path):
    """A run whose questions do not hold their answers, so that nothing can be learnt; it ends by showing one."""
    rows = [json.loads(line) for line in open(config.data.train, encoding="utf-8")]
    rows = [row | {"prompt": row["prompt"].rpartition(" ")[0]} for row in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data, evaluation = {"train": str(tmp_path / "data.jsonl")}, {"answers": True}
    start(config, tmp_path / "out", data=data, evaluation=evaluation)
    return tmp_path / "out"


def test_command_report_and_card_show_scores_the_majority_label_and_speeds(config, finished, printed):
    scores, summary, shown = read(finished, "evaluation.json"), read(finished, "summary.json"), printed(finished)
    found = scores["majority"]["qa"]
    truth = [true for true, _ in scores["final"]["tasks"]["qa"]["items"]]
    assert [true for true, _ in found["items"]] == truth and len(truth) == config.evaluation.questions
    assert found["of"] == "train" and {given for _, given in found["items"]} == {found["label"]}
    assert found["accuracy"] == truth.count(found["label"]) / len(truth)
    assert summary["majority"] == {"qa": without_items(found)}
    assert {"original", "tuned_dense", "final"} == summary["qa"].keys(), "the models' scores keep their keys"
    # The tiny model repeats the last word, which is the answer: far above the majority label.
    assert summary["not_measurable"] == {} and summary["ratios"] == {"qa macro_f1": summary["relative_performance"]}
    sentence = f"Majority label of qa: always '{found['label']}', the most frequent answer of the training questions."
    page = (finished / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    assert sentence in shown and sentence in page
    head = next(line for line in shown.splitlines() if "majority label" in line)
    assert head.split() == ["original", "tuned", "dense", "final", "majority", "label"] or "┃" in head
    row = next(line for line in shown.splitlines() if "qa macro_f1" in line)
    assert f"{found['macro_f1']:.3f}" in row.split("│")[-2]
    assert '<th scope="col">majority label</th>' in page and f"{found['macro_f1']:.3f}" in page
    assert f"| {found['macro_f1']:.4g} |\n" in card and "| data | score | value | majority label |" in card
    assert 0 < shown.index("qa macro_f1") < shown.index("held-out perplexity") < shown.index("share of the decoder")
    speed = summary["speed"]["final"]
    low, high = speed["decode_tokens_per_second_interval"]
    assert f"{speed['decode_tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})" in shown
    assert "Qa macro-F1: tuning alone takes the whole model from" in shown
    assert "certificate: pass\n" in shown and "merge error" not in shown
    failed = printed(finished, certificate=summary["certificate"] | {"merge_error": 1.5})
    assert "certificate: FAIL: merge_error is 1.50e+00, not at most 1 (weights with the adapter merged in" in failed


def test_a_run_from_python_leaves_what_the_commands_read(config, tmp_path, wide_budget):
    from atp import Run

    def refuse(*arguments, **options):
        raise AssertionError("nothing is generated")

    folder = tmp_path / "mine"
    values = config.model_dump(mode="json") | {"output_dir": str(folder)}
    values["evaluation"] |= {"samples": 0, "dense_baseline": False, "questions": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atp.evaluation.samples.generate_answers", refuse)
        summary = Run(type(config).parse(values), say=lambda line: None).execute()
    assert "samples" not in summary, "no prompts are answered if none are asked for"
    assert "side by side" not in (folder / "report.html").read_text(encoding="utf-8")
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
