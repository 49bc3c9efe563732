"""`atp init`: the config that it writes is one that runs, for each shape of data."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny_inputs import WORDS, tiny_config

from atp.cli import main
from atp.config import ATPConfig
from atp.data.examples import values
from atp.draft import draft
from atp.errors import InputError
from atp.loading import load_data, load_tokenizer

TEXT = " ".join(WORDS[:8])
TURN = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_config(folder)
    return str(folder)


def rows(tmp_path, make, count=60, name="my data.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(make(number)) for number in range(count)), encoding="utf-8")
    return str(path)


def numbered(number):
    """Texts that no search for duplicates takes for one."""
    return " ".join(str((number * 7 + place * place) % 60) for place in range(12))


PAIR = {"prompt": "query", "completion": "response"}
NUMBERED = ["class 0", "class 1"]


def entailed(label):
    return lambda n: {"premise": numbered(n), "hypothesis": numbered(n + 3), "label": label(n)}


CASES = {
    "text": (lambda n: {"text": numbered(n)}, {}, []),
    "other name": (lambda n: {"id": n, "Body": numbered(n)}, {"text": "Body"}, []),
    "only column": (lambda n: {"übung: a": numbered(n)}, {"text": "übung: a"}, []),
    "pairs": (lambda n: {"q": n, "query": numbered(n), "response": numbered(n + 3)}, PAIR, []),
    "labels": (lambda n: {"prompt": numbered(n), "completion": ["yes", "no"][n % 2]}, {}, ["no", "yes"]),
    "classes": (
        lambda n: {"title": numbered(n + 3), "text": numbered(n), "Label": ["yes", "no"][n % 2]},
        {"prompt": "text", "completion": "Label"}, ["no", "yes"],
    ),
    "stars": (
        lambda n: {"tweet": numbered(n), "stars": str(1 + n % 2)}, {"prompt": "tweet", "completion": "stars"},
        ["class 1", "class 2"],
    ),
    "too many classes": (lambda n: {"text": numbered(n), "label": n}, {}, []),
    "classes in part": (lambda n: {"text": numbered(n), "label": [0, 1, None][n % 3]}, {}, []),
    "one class": (lambda n: {"text": numbered(n), "label": "yes"}, {}, []),
    "only a class column": (lambda n: {"topic": numbered(n)}, {"text": "topic"}, []),
    "negative classes": (lambda n: {"text": numbered(n), "label": n % 2 - 1}, {}, []),
    "entailment": (entailed(lambda n: ["yes", "no"][n % 2]), {}, ["no", "yes"]),
    "entailment and more": (
        lambda n: entailed(lambda n: ["yes", "no"][n % 2])(n) | {"topic": n % 2, "id": n}, {}, ["no", "yes"],
    ),
    "numbered completions": (lambda n: {"prompt": numbered(n), "completion": n % 2}, {}, NUMBERED),
    "numbered targets": (
        lambda n: {"input": numbered(n), "target": n % 2}, {"prompt": "input", "completion": "target"}, NUMBERED,
    ),
    "prompts with classes": (
        lambda n: {"prompt": numbered(n), "label": ["yes", "no"][n % 2]}, {"prompt": "prompt", "completion": "label"},
        ["no", "yes"],
    ),
    "an answer and a class": (
        lambda n: {"prompt": numbered(n), "completion": numbered(n + 3), "label": ["yes", "no"][n % 2]}, {}, [],
    ),
    "numbered entailment": (entailed(lambda n: n % 2), {}, NUMBERED),
    "talks": (lambda n: {"messages": [{"role": "user", "content": numbered(n)}, TURN[1]]}, {}, []),
    "question": (lambda n: {"question": numbered(n), "answer": "yes"}, {}, []),
}  # fmt: skip


UNREAD = ("too many classes", "classes in part", "negative classes", "one class")
TEXTS = ("text", "other name", "only column", "only a class column", *UNREAD)


@pytest.mark.parametrize("case", CASES)
def test_what_it_writes_can_be_trained_on(model, tmp_path, case):
    make, columns, labels = CASES[case]
    made = draft(model, rows(tmp_path, make))
    settings = ATPConfig.parse(yaml.safe_load(made.text))
    names = [f"class {number}" for number in range(3)] if case == "stars" else NUMBERED if "numbered" in case else []
    assert (settings.data.columns, list(settings.data.label_names)) == (columns, names)
    assert list(settings.data.labels) == ([] if names else labels)
    assert settings.data.packing == ("joined" if case in TEXTS else "padded")
    assert settings.evaluation.questions == (100 if labels else 0)
    assert any("labels are numbers" in line for line in made.remarks) == bool(names)
    assert any("to give a text's class" in line for line in made.remarks) == (
        case in ("classes", "stars", "numbered targets", "prompts with classes")
    )
    unread = "set data.columns to {prompt: text, completion: label}"
    assert any(line.endswith(unread) for line in made.remarks) == (case in UNREAD)
    data = load_data(settings, load_tokenizer(settings.model))
    assert len(data.train) > 0 and data.train.longer <= 0.1 * 60
    assert {label for label in values(data.splits.train, "label") if label} == set(labels)


def test_the_length_holds_nearly_all_samples(model, tmp_path):
    long = draft(model, rows(tmp_path, lambda n: {"text": " ".join(WORDS[:10] * 9) + f" {n}"}))
    assert "length: 128" in long.text and "lengths: 92 tokens in the middle" in long.remarks[1]


def answered(tokens, answer):
    """How to make rows of so many tokens, with an answer of one of two words, or of a number of its own and others."""
    return lambda n: {
        "prompt": f"{numbered(n)} {'7 ' * (tokens - 13 - answer)}".strip(),
        "completion": " ".join([["yes", "no"][n % 2] if answer == 1 else str(n % 60), *["8"] * (answer - 1)]),
    }


@pytest.mark.parametrize(
    ("make", "count", "keep", "steps", "batch_size"),
    [
        (lambda n: {"text": numbered(n)}, 60, 0.6, 400, 1),
        (answered(26, 1), 60, 0.6, 200, 4),
        (answered(26, 1), 800, 0.6, 800, 4),
        (answered(26, 1), 800, 0.4, 800, 4),
        (answered(26, 1), 1001, 0.6, 1600, 4),  # more rows than it looks at
        (answered(300, 1), 1000, 0.6, 1000, 4),
        (answered(26, 12), 60, 0.6, 400, 1),
        (answered(26, 12), 400, 0.6, 400, 4),
        (answered(26, 12), 1001, 0.6, 400, 16),
        (answered(130, 80), 1001, 0.6, 400, 2),
        (answered(300, 80), 1001, 0.6, 400, 1),
        (answered(300, 20), 1001, 0.6, 400, 4),  # 21 tokens with a loss
    ],
)
def test_a_step_has_enough_to_learn_from_and_a_run_reads_no_sample_often(
    model, tmp_path, make, count, keep, steps, batch_size
):
    settings = ATPConfig.parse(yaml.safe_load(draft(model, rows(tmp_path, make, count), keep=keep).text))
    assert (settings.training.steps, settings.training.batch_size) == (steps, batch_size)
    assert settings.decisions.target_keep == keep


def test_a_part_of_the_rows_promises_no_epochs(model, tmp_path):
    path = rows(tmp_path, lambda n: {"text": numbered(n)})
    assert "times through these data" in draft(model, path, rows=60).text
    part = draft(model, path, rows=59)
    assert "times through" not in part.text and "by the first 59 rows" in part.remarks[0]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"x": TEXT, "y": TEXT}, "none of the columns x, y is known"),
        ({"x": 1}, "none of the columns x is known"),
        ({"text": ""}, "no text"),
    ],
)
def test_data_that_mean_nothing_are_refused(model, tmp_path, row, sentence):
    with pytest.raises(InputError, match=sentence):
        draft(model, rows(tmp_path, lambda n: row))


def test_the_command_writes_once(model, tmp_path, monkeypatch, capsys):
    data, out = rows(tmp_path, lambda n: {"text": numbered(n)}), tmp_path / "mine.yaml"

    def init(*more):
        monkeypatch.setattr(sys, "argv", ["atp", "init", model, data, "--out", str(out), *more])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, *capsys.readouterr()

    code, _, told = init("--keep", "1.5")
    assert code == 2 and "--keep is a share of the decoder, so 1.5 is none" in told and not out.exists()
    code, shown, _ = init()
    assert code == 0 and f"next: atp plan {out}" in shown and ATPConfig.load(out).data.train == data
    first = out.read_bytes()
    code, _, told = init()
    assert code == 2 and "exists already" in told and out.read_bytes() == first
    out.unlink()
    out.symlink_to(tmp_path / "elsewhere.yaml")
    assert init()[0] == 2 and not (tmp_path / "elsewhere.yaml").exists()
    out = tmp_path / "absent" / "a.yaml"
    code, _, told = init()
    assert code == 2 and "does not exist" in told and not out.parent.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_leaves_no_half_config(model, tmp_path, monkeypatch, capsys):
    def fill(*args, **options):
        made = draft(*args, **options)
        monkeypatch.setattr(Path, "open", lambda path, *_, **__: path.touch() or open("/dev/full", "w"))
        return made

    data, out = rows(tmp_path, lambda n: {"text": numbered(n)}), tmp_path / "mine.yaml"
    monkeypatch.setattr("atp.draft.draft", fill)
    monkeypatch.setattr(sys, "argv", ["atp", "init", model, data, "--out", str(out)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 1 and "the disk is full" in capsys.readouterr().err and not out.exists()
