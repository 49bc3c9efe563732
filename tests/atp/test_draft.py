"""`atp init`: the config that it writes is one that runs, for each shape of data."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_inputs import WORDS, tiny_config

from atp.cli.columns import Columns
from atp.cli.draft import UnusableRows, draft
from atp.cli.settings import _ask
from atp.config import ATPConfig
from atp.data.examples import values
from atp.ground.errors import InputError
from atp.inputs.loading import load_data, load_tokenizer
from atp.plan import make_plan

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
    assert settings.evaluation.questions == (12 if labels else 0), "a fifth of 60 documents is held out"
    assert any("labels are numbers" in line for line in made.remarks) == bool(names)
    assert any("to give a text's class" in line for line in made.remarks) == (
        case in ("classes", "stars", "numbered targets", "prompts with classes")
    )
    unread = "set data.columns to {prompt: text, completion: label}"
    assert any(line.endswith(unread) for line in made.remarks) == (case in UNREAD)
    data = load_data(settings, load_tokenizer(settings.model))
    assert len(data.train) > 0 and data.train.longer <= 0.1 * 60
    assert {label for label in values(data.splits.train, "label") if label} == set(labels)


def test_the_length_holds_nearly_all_samples_and_a_part_of_the_rows_promises_no_epochs(model, tmp_path):
    long = draft(model, rows(tmp_path, lambda n: {"text": " ".join(WORDS[:10] * 9) + f" {n}"}))
    assert "length: 128" in long.text and "lengths: 92 tokens at the median" in long.remarks[1]
    path = rows(tmp_path, lambda n: {"text": numbered(n)})
    assert "times through these data" in draft(model, path, rows=60).text
    part = draft(model, path, rows=59)
    assert "times through" not in part.text and "by the first 59 rows" in part.remarks[0]


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
def test_a_step_learns_enough_and_a_run_reads_no_sample_often(model, tmp_path, make, count, keep, steps, batch_size):
    settings = ATPConfig.parse(yaml.safe_load(draft(model, rows(tmp_path, make, count), keep=keep).text))
    assert (settings.training.steps, settings.training.batch_size) == (steps, batch_size)
    assert settings.decisions.target_keep == keep


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"x": 1, "y": "2.5"}, "none of the columns x, y is known"), ({"x": 1}, "none of the columns x is known"),
        ({"text": ""}, "no text"), ({"x": TEXT}, "59 of 60 examples repeat another's document"),
    ],
)  # fmt: skip
def test_data_that_mean_nothing_are_refused(model, tmp_path, row, sentence):
    with pytest.raises(InputError, match=sentence):
        draft(model, rows(tmp_path, lambda n: row))


def drafted(model, data, *overrides, **options):
    made = draft(model, data, overrides=overrides, **options)
    return ATPConfig.parse(yaml.safe_load(made.text)), made


@pytest.mark.parametrize(
    ("make", "copies"),
    [*((CASES[case][0], 20) for case in ("text", "classes", "talks")), (CASES["labels"][0], 0), (CASES["pairs"][0], 0)],
)
def test_what_it_writes_leaves_a_plan_nothing_to_advise(model, tmp_path, make, copies):
    """Near-duplicates leave fewer samples than rows, so only the splits of the run say how often it reads them."""
    path = rows(tmp_path, lambda n: make(n - copies if n >= 60 else n), 60 + copies)
    settings, made = drafted(model, path)
    found = make_plan(settings)["data"]
    # What remains says what follows from few tokens with a loss, and that is no setting.
    assert [line for line in found["shortfalls"] if "a step learns from" not in line] == []
    assert f"steps: {settings.training.steps} # about {found['epochs']:.2f} times through these data" in made.text


def test_few_rows_that_cannot_be_used_are_left_out_and_told(model, tmp_path):
    path = Path(rows(tmp_path, lambda n: {"text": numbered(n)}))
    good = path.read_bytes().splitlines()
    bad = [b'{"text": ', b"[1]", b'{"text": null}', b'{"txt": "a"}', b'{"text": "caf\xe9"}', b'{"text": " "}']
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([*good[:20], b"", *bad, *good[20:]]))
    settings, made = drafted(model, str(path))
    assert settings.data.on_error == "skip" and "6 rows cannot be used" in made.text
    assert len(made.bad) == len(made.bad.kinds) == 6 and "by all 60 rows that can be used, of 66" in made.remarks[0]
    told = sorted(made.bad.examples(10))
    assert [line.partition(": ")[0].rpartition(":")[2] for line in told] == [str(place) for place in range(22, 28)]
    assert len(load_data(settings, load_tokenizer(settings.model)).splits.skipped) == 6


def test_many_rows_that_cannot_be_used_are_told_and_nothing_is_written(model, tmp_path, atp):
    path = Path(rows(tmp_path, lambda n: {"text": numbered(n)} if n % 3 else {"txt": "a"}))
    with pytest.raises(UnusableRows, match=r"20 of 60 rows cannot be used \(most often: no column of a known name\)"):
        draft(model, str(path))
    out = tmp_path / "mine.yaml"
    code, shown, told = atp("init", model, path, "--out", out)
    assert code == 2 and told.count("\n") == 1 and not out.exists()
    assert "20     no column of a known name" in shown
    assert shown.count(f"{path.name}:") == 10


def test_columns_that_are_given_say_what_they_hold(model, tmp_path):
    path = rows(tmp_path, lambda n: {"a": {"b": numbered(n)}, "c": ["yes", "no"][n % 2], "text": "x"})
    wanted = {"prompt": "a.b", "completion": "c"}
    override = "data.columns={prompt: a.b, completion: c}"
    for settings, _ in (drafted(model, path, columns=wanted), drafted(model, path, override)):
        assert settings.data.columns == wanted and settings.data.labels == ("no", "yes")
        assert len(load_data(settings, load_tokenizer(settings.model)).train) > 0


@pytest.mark.parametrize("names", ["headline section", "prompt completion", "query response", "body topic"])
def test_a_few_rows_without_a_class_hide_no_classes(model, tmp_path, names):
    first, second = names.split()
    empty = None if first == "body" else ""
    path = rows(tmp_path, lambda n: {first: numbered(n), second: empty if n in (7, 47) else ("no", "yes")[n % 2]})
    settings, made = drafted(model, path)
    assert settings.data.labels == ("no", "yes") and settings.evaluation.questions > 0
    assert settings.data.columns == ({} if first == "prompt" else {"prompt": first, "completion": second})
    assert settings.data.on_error == "skip" and any("labels: no, yes" in line for line in made.remarks)
    assert [line.partition(": ")[0] for line in made.bad.examples(10)] == [f"{path}:8", f"{path}:48"]


def test_unknown_names_are_guessed_and_asked_for_at_a_terminal(model, tmp_path, monkeypatch, capsys):
    path = rows(tmp_path, lambda n: {"nr": str(n), "Frage": numbered(n), "Antwort": numbered(n + 3)})
    settings, made = drafted(model, path)
    assert settings.data.columns == {"prompt": "Frage", "completion": "Antwort"}
    assert any("a guess by their content" in line for line in made.remarks)
    settings, made = drafted(model, path, ask=lambda guess, named: {"text": named[1]})
    assert settings.data.columns == {"text": "Frage"} and not any("a guess" in line for line in made.remarks)
    answers = iter(["Frage", "text=x", "prompt=Frage, completion=Antwort"])
    monkeypatch.setattr("typer.prompt", lambda text, default: next(answers))
    guess = Columns("text", {"text": "Frage"}, sure=False)
    assert _ask(guess, ["Frage", "Antwort"]) == {"prompt": "Frage", "completion": "Antwort"}
    assert "is not of the form" in (shown := capsys.readouterr().out) and "there is no column x" in shown


def test_overrides_win_and_are_written(model, tmp_path):
    path = rows(tmp_path, lambda n: {"text": numbered(n)})
    asked = ("training.steps=5", "lora.r=4", "decisions.target_keep=0.7", "evaluation.windows=50", "seed=3")
    settings, made = drafted(model, path, *asked)
    assert (settings.training.steps, settings.lora.r, settings.decisions.target_keep) == (5, 4, 0.7)
    assert settings.evaluation.windows == 50 and settings.seed == 3 and not settings.training.keep_best
    assert "about" in made.text.partition("steps: 5")[2].partition("\n")[0]
    for wrong, sentence in (("data.train=x.jsonl", "argument DATA"), ("training.stepps=3", "did you mean 'steps'")):
        with pytest.raises(InputError, match=sentence):
            draft(model, path, overrides=[wrong])


def test_the_command_writes_once(model, tmp_path, atp):
    data, out = rows(tmp_path, lambda n: {"text": numbered(n)}), tmp_path / "mine.yaml"

    def init(*more):
        return atp("init", model, data, "--out", out, *more)

    code, _, told = init("--columns", "prompt,completion=a")
    assert code == 2 and "--columns 'prompt,completion=a' is not of the form" in told and not out.exists()
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
def test_a_disk_that_fills_leaves_no_half_config(model, tmp_path, monkeypatch, atp):
    def fill(*args, **options):
        made = draft(*args, **options)
        monkeypatch.setattr(Path, "open", lambda path, *_, **__: path.touch() or open("/dev/full", "w"))
        return made

    data, out = rows(tmp_path, lambda n: {"text": numbered(n)}), tmp_path / "mine.yaml"
    monkeypatch.setattr("atp.cli.draft.draft", fill)
    code, _, err = atp("init", model, data, "--out", out)
    assert code == 1 and "the disk is full" in err and not out.exists()
