"""The tasks for lm-eval: their files fit our tasks, and lm-eval agrees with our scores item by item."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_scored import LABELS, tiny_model

import atp.data.tasks
from atp.config import ATPConfig
from atp.data.splits import Example
from atp.data.tasks import PUBMEDQA, XSUM, Task
from atp.evaluation import evaluate_model, sliding_windows
from atp.evaluation.harness import TEMPLATES, check_harness, harness_scores, write_tasks
from atp.export.card import model_card
from atp.ground.errors import InputError
from atp.models import ATPLlamaConfig, ATPLlamaForCausalLM

TASKS = [value for value in vars(atp.data.tasks).values() if isinstance(value, Task)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_has_its_file(task):
    assert {path.stem for path in TEMPLATES.glob("[!_]*.yaml")} == {task.name for task in TASKS}
    content = yaml.safe_load((TEMPLATES / f"{task.name}.yaml").read_text())
    assert content["task"] == f"atp_{task.name}"
    assert content["dataset_kwargs"] == {"data_files": {"test": f"{task.name}.jsonl"}}
    if task.labels:
        assert tuple(content["doc_to_choice"]) == task.labels
    else:
        assert content["generation_kwargs"] == {"until": ["\n\n"], "do_sample": False,
                                                "max_gen_toks": task.max_new_tokens}  # fmt: skip


def test_a_written_folder_binds_file_and_task_and_a_missing_package_names_the_remedy(tmp_path, monkeypatch):
    examples = [Example("a", "is it ?", " yes", "yes", "pubmedqa"), Example("b", "the cat", " sat", None, "xsum")]
    assert write_tasks(examples, [PUBMEDQA, XSUM], tmp_path) == ["atp_pubmedqa", "atp_xsum"]
    rows = [json.loads(line) for line in (tmp_path / "pubmedqa.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "is it ?", "label": "yes", "completion": " yes"}]
    bound = yaml.safe_load((tmp_path / "xsum.yaml").read_text())
    assert bound["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "xsum.jsonl")
    with pytest.raises(InputError, match="no lm-eval task for 'own' .only for billsum, casehold,"):
        write_tasks(examples, [Task("own")], tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="pip install 'lm-eval"):
        check_harness()


def shell_block(text):
    (block,) = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return shlex.split(block.replace("\\\n", " "))


@pytest.mark.slow
def test_the_documented_command_scores_a_cut_model(tmp_path, tokenizer):
    """As docs/evaluation.md has it, in the folder that its Python block leaves, on a model that only we can load."""
    pytest.importorskip("lm_eval")
    layer = {"num_attention_heads": 2, "num_key_value_heads": 1, "qk_pairs": [0, 3], "v_head_dim": 5,
             "intermediate_size": 24}  # fmt: skip
    sizes = tiny_model().config
    config = ATPLlamaConfig(
        vocab_size=sizes.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, per_layer_config={0: layer},
    )  # fmt: skip
    ATPLlamaForCausalLM(config).save_pretrained(tmp_path / "cut")
    tokenizer.save_pretrained(tmp_path / "cut")
    (tmp_path / "tasks").mkdir()
    write_tasks([Example("a", "is it ?", " yes", "yes", "pubmedqa")], [PUBMEDQA], tmp_path / "tasks")
    root = Path(__file__).parents[3]
    python, *arguments = shell_block((root / "docs" / "evaluation.md").read_text(encoding="utf-8"))
    assert python == "python"
    arguments = [argument.replace("FOLDER", "cut") for argument in arguments]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, *arguments], **options)
    assert done.returncode == 0 and re.search(r"\|atp_pubmedqa *\|.*\|acc ", done.stdout), done.stderr[-2000:]
    card = model_card(ATPConfig.parse({"model": {"path": "m"}, "output_dir": "o"}), 2, 1)
    assert shell_block(card)[:5] == [python, *arguments[:4]], "the model's own README starts it in the same way"


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
