"""The files of examples/data, one of each kind as people have them, are read as docs/data.md says."""

from pathlib import Path

import pytest

from atp.data.custom import Meaning, read_examples
from atp.data.recipes import load_recipe
from atp.data.settings import DataSettings

FOLDER = Path(__file__).parents[3] / "examples" / "data"
SENTIMENT = {"columns": {"prompt": "review", "completion": "sentiment"}, "label_names": ("negative", "positive")}
RELATION = {"label_names": ("entailment", "neutral", "contradiction")}
# name -> (how it is read, rows, beginning and end of the first example, its task)
FILES = {
    "texts.jsonl": ({}, 12, "Leaky tap. Close", "of the same size.", ""),
    "texts.jsonl.gz": ({}, 12, "Leaky tap. Close", "of the same size.", ""),
    "alpaca.json": ({}, 12, "User: Rewrite the", "\nAssistant: The roses are watered by the gardener.", "answers"),
    "sharegpt.jsonl": (
        {}, 12, "System: You answer briefly.\nUser: Can I freeze", "until it steams throughout.", "answers",
    ),
    "tools.jsonl": (
        {}, 12, "System: Use the tools.\nUser: Do I need", "Assistant: No: sunny, 24 °C in Lisbon.", "answers",
    ),
    "trl.jsonl": ({}, 12, "User: Can I freeze", "until it steams throughout.", "answers"),
    "questions.csv": ({}, 12, 'User: Earlier: "Can I freeze', "until it steams throughout.", "answers"),
    "reviews.parquet": (SENTIMENT, 14, "Arrived early, works", "as described. positive", "qa"),
    "entailment.arrow": (RELATION, 14, "Premise: A man is", "contradiction): entailment", "nli"),
}  # fmt: skip


def test_every_file_is_here():
    assert {path.name for path in FOLDER.iterdir()} == FILES.keys() | {"README.md"}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_is_read(name):
    meaning, rows, begins, ends, task = FILES[name]
    found = read_examples(str(FOLDER / name), meaning=Meaning(**meaning))
    first = found[0].text
    assert len(found) == rows and first.startswith(begins) and first.endswith(ends), first
    assert {example.task for example in found} == {task}
    splits = load_recipe(DataSettings(recipe="custom", train=str(FOLDER / name), **meaning))
    assert all((splits.train, splits.calibration, splits.test))


def test_a_validation_file_is_the_users_own_and_its_doubles_leave_train(tmp_path):
    lines = (FOLDER / "texts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    near = lines[0].replace("Close", "Please close", 1)
    (tmp_path / "train.jsonl").write_text("".join([*lines, near]), encoding="utf-8")
    watched = str(FOLDER / "sharegpt.jsonl")
    splits = load_recipe(DataSettings(recipe="custom", train=str(tmp_path / "train.jsonl"), validation=watched))
    assert len(splits.validation) == 12 and splits.validation[0].prompt.startswith("System: You answer")
    (tmp_path / "validation.jsonl").write_text(near, encoding="utf-8")
    (tmp_path / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    held = {"test": str(FOLDER / "tools.jsonl"), "calibration": str(FOLDER / "alpaca.json")}
    one = load_recipe(
        DataSettings(
            recipe="custom", train=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "validation.jsonl"), **held
        )
    )  # fmt: skip
    assert len(one.train) == 11 and len(one.validation) == 1
    assert not any(example.text.startswith("Leaky tap") for example in one.train)
