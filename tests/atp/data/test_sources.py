"""Files of all formats, folders, several sources with weights, and rows that are skipped."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from atp.data.files import read_rows
from atp.data.recipes import load_recipe
from atp.data.settings import DataSettings
from atp.ground.errors import InputError

ROWS = [{"text": text} for text in ("t0", "t1", "t2", "[1, 2]", "t4")]


def lines(rows):
    return "\n".join(map(json.dumps, rows))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def values(source, **options):
    return [row.values for row in read_rows(str(source), **options)]


@pytest.mark.parametrize(
    "text",
    [json.dumps(ROWS), f" {json.dumps(ROWS)} \n", json.dumps({"version": 1, "data": ROWS}), lines(ROWS)],
)
def test_json_holds_a_list_or_an_object_with_one(tmp_path, text):
    path = tmp_path / "a.json"
    assert values(write(path, text)) == ROWS and values(path, limit=2) == ROWS[:2]
    with gzip.open(tmp_path / "a.json.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    assert values(tmp_path / "a.json.gz") == ROWS


def test_compressed_lines_and_damaged_ones(tmp_path):
    packed = gzip.compress(lines(ROWS).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    rows = read_rows(str(tmp_path / "a.jsonl.gz"))
    assert [row.values for row in rows] == ROWS and rows[2].where.endswith("a.jsonl.gz, line 3")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\nt0\n"))
    assert values(tmp_path / "a.csv.gz") == ROWS[:1]
    for damaged in (packed[:-9], b"no gzip", packed[:10] + b"\x07" + packed[11:]):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(InputError, match="a.jsonl.gz: not a gzip file, or a damaged one .*; compress it again"):
            read_rows(str(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.parquet.gz").write_bytes(packed)
    with pytest.raises(InputError, match="unknown file type '.gz'"):
        read_rows(str(tmp_path / "a.parquet.gz"))


def test_a_folder_is_all_its_files_by_name(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "b.jsonl", lines(ROWS[2:]))
    write(folder / "a.json", json.dumps(ROWS[:2]))
    for name in ("README.md", ".hidden.jsonl", "dataset_info.json"):
        write(folder / name, "[5]")
    assert values(folder) == ROWS and values(folder, limit=3) == ROWS[:3]
    assert read_rows(str(folder))[2].where.endswith("texts/b.jsonl, line 1")
    write(folder / "test-0.jsonl", lines(ROWS))
    with pytest.raises(InputError, match=r"holds files of several splits, such as test-0.jsonl: .*texts:train"):
        read_rows(str(folder))


def test_what_datasets_saves_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert values(tmp_path / "saved") == ROWS


def sources(folder, **counts):
    return {
        name: write(folder / f"{name}.jsonl", lines([{"text": f"{name} number {n}"} for n in range(count)]))
        for name, count in counts.items()
    }


def loaded(**settings):
    return load_recipe(DataSettings(recipe="custom", **settings))


def test_several_sources_are_read_in_order(tmp_path):
    paths = sources(tmp_path, law=6, news=5, held=3, more=3)
    splits = loaded(train=(paths["law"], paths["news"]), test=[paths["held"], paths["more"]], calibration_share=0.1)
    assert len(splits.train) == 10 and len(splits.test) == 6
    assert splits.description.startswith(f"{paths['law']}, {paths['news']}: 10 train")


def test_weights_are_shares_of_the_training_rows(tmp_path):
    paths = sources(tmp_path, law=100, news=400, held=9, calm=9)
    given = {paths["law"]: 3, paths["news"]: 1}
    options = {"test": paths["held"], "calibration": paths["calm"]}
    splits = loaded(train=given, **options)
    assert Counter(e.text.split()[0] for e in splits.train) == {"law": 100, "news": 33}
    assert (
        "law.jsonl (weight 3)" in splits.description and "weights leave out 367 training examples" in splits.description
    )
    assert loaded(train=given, **options).fingerprints == splits.fingerprints
    other = loaded(train=given, seed=1, **options)
    assert {e.text for e in other.train} != {e.text for e in splits.train}
    # Those that stay keep their places.
    places = [int(e.text.split()[-1]) for e in splits.train if e.text.startswith("news")]
    assert places == sorted(places)


def test_weights_leave_the_held_out_documents_alone(tmp_path):
    """Runs with other weights are scored on the same test documents."""
    paths = sources(tmp_path, law=50, news=50)
    one, two = (loaded(train={paths["law"]: weight, paths["news"]: 1}) for weight in (1, 4))
    assert (
        one.fingerprints["test"] == two.fingerprints["test"] == loaded(train=list(paths.values())).fingerprints["test"]
    )
    counts = Counter(e.text.split()[0] for e in two.train)
    assert counts["news"] == round(counts["law"] / 4)


def test_a_weighted_source_that_is_all_held_out_is_named(tmp_path):
    paths = sources(tmp_path, news=9, calm=9)
    words = "one two three four five six seven eight nine ten"
    law = write(tmp_path / "law.jsonl", lines([{"text": f"{words} eleven"}]))
    held = write(tmp_path / "held.jsonl", lines([{"text": f"{words} twelve"}]))
    with pytest.raises(InputError, match="no training rows of .*law.jsonl are left: add rows, or take it out of"):
        loaded(train={law: 1, paths["news"]: 1}, test=held, calibration=paths["calm"])


def test_bad_rows_stop_or_are_counted_and_listed(tmp_path):
    rows = [*ROWS, {"text": ""}, {"body": "x"}, *({"text": f"more {n}"} for n in range(15)), *[{"text": " "}] * 9]
    path = write(tmp_path / "a.jsonl", lines(rows) + "\n{broken\n[1]\n")
    with pytest.raises(InputError, match="a.jsonl, line 6: no text; .*; or leave such rows out with data.on_error=ski"):
        loaded(train=path)
    splits = loaded(train=path, on_error="skip")
    assert sum(len(part) for part in (splits.train, splits.calibration, splits.test)) == 20
    assert splits.description.endswith("; 13 rows skipped")
    where = [sentence.partition(": ")[0].rpartition("/")[2] for sentence in splits.skipped]
    assert where == [f"a.jsonl, line {number}" for number in (6, 7, *range(23, 34))]
    assert any("no text; remove the row" in sentence for sentence in splits.skipped)
    assert splits.remarks[0] == splits.description, "ten of them are shown"
    assert len(splits.remarks) == 12 and splits.remarks[-1] == "and 3 more"
    texts = "\n".join(f"t{n}" for n in range(10))
    for path in (
        write(tmp_path / "a.csv", f"text\n{texts}\na,b\n"),
        write(tmp_path / "a.json", json.dumps([{"text": f"t{n}"} for n in range(10)] + [5])),
    ):
        splits = loaded(train=path, on_error="skip")
        assert len(splits.skipped) == 1 and Path(path).name in splits.skipped[0]


def test_a_source_without_a_usable_row_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", lines([{"body": "x"}] * 3))
    with pytest.raises(InputError, match="none of the 3 rows of .*a.jsonl can be used; the first: .*line 1: neither"):
        loaded(train=path, on_error="skip")
    with pytest.raises(InputError, match="none of the 1 rows of .*b.jsonl can be used; the first: .*not valid JSON"):
        loaded(train=write(tmp_path / "b.jsonl", "{"), on_error="skip")
