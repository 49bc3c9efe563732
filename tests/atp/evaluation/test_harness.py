"""The tasks for lm-eval: their files fit our tasks, and lm-eval agrees with our scores item by item."""

import json

import pytest
import yaml
from tiny_scored import LABELS

import atp.data.tasks
from atp.data.splits import Example
from atp.data.tasks import PUBMEDQA, XSUM, Task
from atp.errors import InputError
from atp.evaluation import evaluate_model, sliding_windows
from atp.evaluation.harness import TEMPLATES, check_harness, harness_scores, write_tasks

TASKS = [value for value in vars(atp.data.tasks).values() if isinstance(value, Task)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_has_its_file(task):
    content = yaml.safe_load((TEMPLATES / f"{task.name}.yaml").read_text())
    assert content["task"] == f"atp_{task.name}"
    assert content["dataset_kwargs"] == {"data_files": {"test": f"{task.name}.jsonl"}}
    if task.labels:
        assert tuple(content["doc_to_choice"]) == task.labels
    else:
        assert content["generation_kwargs"] == {"until": ["\n\n"], "do_sample": False,
                                                "max_gen_toks": task.max_new_tokens}  # fmt: skip


def test_there_is_no_file_without_a_task():
    assert {path.stem for path in TEMPLATES.glob("[!_]*.yaml")} == {task.name for task in TASKS}


def test_written_folder_binds_file_and_task(tmp_path):
    examples = [Example("a", "is it ?", " yes", "yes", "pubmedqa"), Example("b", "the cat", " sat", None, "xsum")]
    assert write_tasks(examples, [PUBMEDQA, XSUM], tmp_path) == ["atp_pubmedqa", "atp_xsum"]
    rows = [json.loads(line) for line in (tmp_path / "pubmedqa.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "is it ?", "label": "yes", "completion": " yes"}]
    bound = yaml.safe_load((tmp_path / "xsum.yaml").read_text())
    assert bound["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "xsum.jsonl")
    with pytest.raises(InputError, match="no lm-eval task for 'own': there are billsum, casehold,"):
        write_tasks(examples, [Task("own")], tmp_path)


def test_missing_package_names_the_remedy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="pip install 'lm-eval"):
        check_harness()


def test_lm_eval_agrees_item_by_item(model, tokenizer, examples):
    pytest.importorskip("lm_eval")
    pytest.importorskip("rouge_score")
    asked = [Example(e.document, e.prompt, e.completion, e.label, "pubmedqa") for e in examples]
    asked += [Example(e.document, e.prompt, " the cat sat on the mat", None, "xsum") for e in examples]
    assert PUBMEDQA.labels == LABELS
    ours = evaluate_model(model, tokenizer, sliding_windows(asked, tokenizer, 16), asked, tasks=[PUBMEDQA, XSUM])
    theirs = harness_scores(model, tokenizer, asked, [PUBMEDQA, XSUM])
    assert theirs["pubmedqa"]["predictions"] == [label for _, label in ours["tasks"]["pubmedqa"]["items"]]
    assert theirs["pubmedqa"]["accuracy"] == pytest.approx(ours["tasks"]["pubmedqa"]["accuracy"])
    for metric in ("rouge1", "rouge2", "rougeL"):
        assert theirs["xsum"][metric] == pytest.approx(ours["tasks"]["xsum"][metric])
    assert theirs["pubmedqa"]["n"] == theirs["xsum"]["n"] == 9
