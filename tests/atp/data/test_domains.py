"""The paper's domains on small local files in the schemas of the Hub: counts, prompts, and the column that is wrong."""

import json
from itertools import combinations

import pytest

from atp.data.domains import GENERAL, HEALTH, LEGAL
from atp.data.recipes import load_recipe
from atp.data.settings import DataSettings
from atp.ground.errors import InputError

ROWS = {
    "mednli": lambda n: {
        "pairID": f"p{n}", "sentence1": f"Patient {n // 3} had finding number {n // 3} on day {n // 3} .",
        "sentence2": f"The patient is well {n}", "gold_label": ("entailment", "neutral", "contradiction")[n % 3],
        "sentence1_parse": "(ROOT)", "sentence2_parse": "(ROOT)",
    },
    "pubmedqa": lambda n: {
        "pubid": n, "question": f"Does drug {n} work?", "long_answer": "It does.",
        "final_decision": "yes" if n % 2 else "no",
        "context": {"contexts": [f"Trial {n} began.", f"Trial {n} ended {n * n}."], "labels": ["A", "B"], "meshes": []},
    },
    "hqs": lambda n: {
        "File": f"{n}.txt", "CHQ": f"SUBJECT: pill {n}\nMESSAGE: may I take {n}", "Summary": f"Is pill {n} safe?",
    },
    "casehold": lambda n: {
        "context": f"In case {n} the court held <HOLDING> and remanded {n}",
        "endings": [f"holding {n} {m}" for m in range(5)], "label": n % 5,
    },
    "billsum": lambda n: {
        "text": f"SECTION {n}. " + f"clause{n} " * 900, "summary": f"Amends\n act {n}.", "title": f"Act {n}",
    },
    "text": lambda n: {"text": f"Paragraph {n} on the matter of {n * 7} and {n * 11}.", "type": "x", "url": "y"},
}  # fmt: skip
RECIPES = {"health": HEALTH, "legal": LEGAL, "general": GENERAL}


@pytest.fixture
def sources(tmp_path):
    """Writes 120 rows of every data set, and returns the sources of a recipe."""
    for name, row in ROWS.items():
        lines = "\n".join(json.dumps(row(n)) for n in range(120))
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return lambda recipe: {one.name: str(tmp_path / f"{one.name}.jsonl") for one in RECIPES[recipe]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_parts_share_no_document_and_fingerprints_are_fixed(recipe, sources):
    settings = DataSettings(recipe=recipe, sources=sources(recipe), general_share=0, seed=1)
    splits = load_recipe(settings)
    documents = [{e.document for e in part} for part in (splits.train, splits.calibration, splits.test)]
    for one, two in combinations(documents, 2):
        assert not one & two
    assert load_recipe(settings).fingerprints == splits.fingerprints
    other = load_recipe(DataSettings(recipe=recipe, sources=sources(recipe), general_share=0, seed=2))
    assert other.fingerprints["train"] != splits.fingerprints["train"]


def test_health_keeps_premises_together_and_proportions(sources):
    splits = load_recipe(DataSettings(recipe="health", sources=sources("health"), general_share=0, scale=0.005))
    train = [e.task for e in splits.train]
    # MedNLI comes by premise, three at a time.
    assert 35 <= train.count("mednli") <= 37 and (train.count("pubmedqa"), train.count("hqs")) == (35, 5)
    assert {e.task for e in splits.test} == {"mednli", "pubmedqa", "hqs", ""}
    assert [task.name for task in splits.tasks] == ["mednli", "pubmedqa", "hqs"]
    places = [index for index, task in enumerate(train) if task == "mednli"]
    assert places[0] < 20 and places[-1] > 50, "the data sets are mixed"


def test_prompts_and_answers(sources):
    splits = load_recipe(DataSettings(recipe="health", sources=sources("health"), general_share=0))
    everything = splits.train + splits.calibration + splits.test
    texts = {e.text for e in everything}
    assert "Abstract: Trial 7 began. Trial 7 ended 49.\nQuestion: Does drug 7 work?\nAnswer: yes" in texts
    assert (
        "Message: SUBJECT: pill 3\nMESSAGE: may I take 3\nThe question it asks, in one sentence: Is pill 3 safe?"
        in texts
    )
    mednli = next(e for e in everything if e.task == "mednli" and e.label == "neutral")
    assert mednli.text.endswith("Relation (entailment, neutral or contradiction): neutral")
    legal = load_recipe(DataSettings(recipe="legal", sources=sources("legal"), general_share=0))
    everything = legal.train + legal.calibration + legal.test
    seven = next(e for e in everything if e.prompt.startswith("Citing text: In case 7 "))
    assert seven.label == "C" and "\nC. holding 7 2\n" in seven.prompt and seven.completion == " C"
    bill = next(e for e in everything if e.task == "billsum")
    assert len(bill.passage.split()) == 700 and bill.completion.startswith(" Amends act ")


def test_a_test_file_of_its_own(sources, tmp_path):
    given = sources("legal")
    rows = [json.dumps(ROWS["casehold"](n)) for n in range(500, 510)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(rows))
    given["casehold_test"] = str(tmp_path / "held_out.jsonl")
    splits = load_recipe(DataSettings(recipe="legal", sources=given, general_share=0))
    tested = [e for e in splits.test if e.task == "casehold"]
    assert len(tested) == 10 and all("In case 50" in e.prompt for e in tested)


def test_general_text_takes_the_part_of_c4(sources, tmp_path):
    (tmp_path / "web.jsonl").write_text("\n".join(json.dumps({"text": f"web page {n} says {n}"}) for n in range(300)))
    settings = DataSettings(recipe="legal", sources=sources("legal"), general=str(tmp_path / "web.jsonl"))
    splits = load_recipe(settings)
    web = [e for e in splits.calibration if e.prompt.startswith("web page")]
    assert len(web) == round((len(splits.calibration) - len(web)) / 2)


WRONG = [
    ("health", "mednli", "sentence1"), ("health", "mednli", "sentence2"), ("health", "mednli", "gold_label"),
    ("health", "pubmedqa", "context.contexts"), ("health", "pubmedqa", "question"),
    ("health", "pubmedqa", "final_decision"),
    ("health", "hqs", "CHQ"), ("health", "hqs", "Summary"), ("health", "text", "text"),
    ("legal", "casehold", "context"), ("legal", "casehold", "endings"), ("legal", "casehold", "label"),
    ("legal", "billsum", "text"), ("legal", "billsum", "summary"), ("general", "text", "text"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "name", "column"), WRONG)
def test_a_wrong_schema_names_the_missing_column(recipe, name, column, sources, tmp_path):
    row = ROWS[name](0)
    *parents, last = column.split(".")
    inner = row
    for parent in parents:
        inner = inner[parent]
    inner["renamed"] = inner.pop(last)
    (tmp_path / "wrong.jsonl").write_text(json.dumps(row))
    given = sources(recipe) | {name: str(tmp_path / "wrong.jsonl")}
    with pytest.raises(InputError, match=rf"wrong.jsonl, line 1: column '{column}' is missing \(found: .*renamed"):
        load_recipe(DataSettings(recipe=recipe, sources=given))


@pytest.mark.parametrize(
    ("recipe", "name", "change", "message"),
    [
        ("health", "mednli", {"gold_label": "-"}, "label '-' is not one of entailment, neutral, contradiction"),
        ("health", "pubmedqa", {"context": {"contexts": "one text"}}, "holds 'one text', not a list of texts"),
        ("legal", "casehold", {"endings": ["a", "b"]}, "column 'endings' holds 2 texts, not 5"),
        ("legal", "casehold", {"label": 5}, "label '5' is not one of 0, 1, 2, 3, 4"),
        ("general", "text", {"text": " "}, "no text"),
    ],
)
def test_bad_rows(recipe, name, change, message, sources, tmp_path):
    (tmp_path / "wrong.jsonl").write_text(json.dumps(ROWS[name](0) | change))
    given = sources(recipe) | {name: str(tmp_path / "wrong.jsonl")}
    with pytest.raises(InputError, match=f"wrong.jsonl, line 1: .*{message}"):
        load_recipe(DataSettings(recipe=recipe, sources=given))


def test_sources_are_checked(sources):
    with pytest.raises(InputError, match="data.sources.mednli is not set: mednli may not be redistributed"):
        load_recipe(DataSettings(recipe="health"))
    given = sources("legal") | {"casehod": "x.jsonl"}
    with pytest.raises(InputError, match="data.sources.casehod is unknown: this recipe has casehold, casehold_test,"):
        load_recipe(DataSettings(recipe="legal", sources=given))


def test_only_what_is_needed_is_read(sources, tmp_path):
    lines = [json.dumps(ROWS["text"](n)) for n in range(100)] + ["not JSON"]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    settings = DataSettings(recipe="general", sources={"text": str(tmp_path / "long.jsonl")}, scale=0.002)
    # 30 + 1 + 1 examples: 64 rows are read.
    splits = load_recipe(settings)
    assert (len(splits.train), len(splits.calibration), len(splits.test)) == (30, 1, 1)
    with pytest.raises(InputError, match="line 101: not valid JSON"):
        load_recipe(DataSettings(recipe="general", sources={"text": str(tmp_path / "long.jsonl")}))
