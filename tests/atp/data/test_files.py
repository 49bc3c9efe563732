"""Reading user files: every mistake is one sentence with file, line and remedy."""

import builtins
import csv
import gzip
import sys
import tracemalloc
from pathlib import Path
from random import Random

import pytest

from atp.data.files import read_rows
from atp.data.formats import read_file
from atp.ground.errors import InputError


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_jsonl_and_csv_give_the_same_rows(tmp_path):
    jsonl = write(
        tmp_path / "a.jsonl", '{"prompt": "p, \\"1\\"", "completion": "c\\nd"}\n\n{"prompt": "é", "completion": ""}'
    )
    csv = write(tmp_path / "a.csv", 'prompt,completion\n"p, ""1""","c\nd"\né,\n')
    expected = [{"prompt": 'p, "1"', "completion": "c\nd"}, {"prompt": "é", "completion": ""}]
    assert [row.values for row in read_rows(jsonl)] == expected
    assert [row.values for row in read_rows(csv)] == expected
    marked = write(tmp_path / "b.csv", Path(csv).read_text(encoding="utf-8"), "utf-8-sig")
    assert [row.values for row in read_rows(marked)] == expected, "a byte-order mark is no part of the first column"
    assert read_rows(jsonl)[1].where.endswith("a.jsonl, line 3")


BROKEN = [
    ("a.jsonl", "", "a.jsonl is empty"), ("a.json", "[]", "a.json is empty"), ("a.csv", "text\n", "is empty"),
    ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", '["a"]', "line 1: a list, not an object"),
    ("a.csv", "prompt,completion\na,b\nc\n", "line 3: not 2 fields"),
    ("a.csv", "prompt,completion\na,b,c\n", "line 2: not 2 fields"),
    ("a.csv", 'text\n"open\n', "JSONL instead"),
    ("a.csv", "text\né\n".encode("latin-1"), "not UTF-8"),
    ("a.txt", "hello", "unknown file type '.txt'"),
    ("a.json", "{", "a.json: not valid JSON"),
    ("a.json", '"text"', "a.json: 'text', not a list; write a list of objects"),
    ("a.json", '{"a": 1}', "a.json: an object with 0 lists, not with one"),
    ("a.json", '{"a": [], "b": []}', "a.json: an object with 2 lists, not with one"),
    ("a.json", '[{"text": "a"}, 5]', "a.json, row 1: 5, not an object"),
    ("a.json", '{"text": "a"}\n{"text": \n', "a.json, line 2: not valid JSON"),
    ("a.json", "[{}", "delimiter at character 4"), ("a.json", "[{} {}]", "delimiter at character 5"),
    ("a.json", "[", "value at character 2"), ("a.json", "[{},]", "value at character 5"),
    ("a.json", "[{}] x", "Extra data at character 6"), ("a.json", "[" * 10**5, "too deeply"),
    ("a.json", '[{"a": "\\ud800"}]', "without its other half"),
    ("a.json", '[{"a": ' + "9" * 5000 + "}]", "thousands of digits"),
    ("a.jsonl", '{"text": ' + "[" * 10**5, "line 1: not valid JSON .nested too deeply"),
    ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1: not valid JSON .a number with thousands of digits"),
    ("a.jsonl", '{"text": "a", "other": "\\ud800"}', "line 1: not valid JSON .an escape .* without its other half"),
    ("a.jsonl", '{"text": NaN}', "line 1: column 'text' holds nan, not text"),
    ("a.jsonl", '{"text": ' + "[" * 900 + "]" * 900 + "}", "line 1: column 'text' holds .*not text"),
    ("a.jsonl", '{"text": ["' + "x" * 10**6 + '"]}', "line 1: column 'text' holds .*not text"),
    ("a.jsonl", '{"' + "x" * 10**6 + '": 1}', r"line 1: column 'text' is missing \(found: x+\.\.\.\)"),
    ("a.jsonl", "{" + ", ".join(f'"{n}": 1' for n in range(10**5)) + "}", r"column 'text' is missing \(found: 0, 1,"),
    ("a.jsonl", '{"x": "1", "y": 2}', r"a.jsonl, line 1: column 'text' is missing \(found: x, y\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_broken_is_one_short_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_rows(str(tmp_path / name))[0].text("text")
    assert len(str(caught.value)) < 600


NESTED = '{"a": {"b": ["x", 1], "c": ["x"]}, "t": "x"}'


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda row: row.text("a.d"), r"column 'a.d' is missing \(found: b, c\)"),
        (lambda row: row.text("t.b"), r"column 't.b' is missing \(found: none\)"),
        (lambda row: row.texts("a.b"), r"column 'a.b' holds \['x', 1\], not a list of texts"),
        (lambda row: row.texts("a.c", 2), "column 'a.c' holds 1 texts, not 2"),
    ],
)
def test_nested_column_errors(tmp_path, read, message):
    with pytest.raises(InputError, match=message):
        read(read_rows(write(tmp_path / "a.jsonl", NESTED))[0])


def test_damaged_parquet_is_one_short_sentence_that_names_the_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    whole = tmp_path / "whole.parquet"
    write_table(pyarrow.Table.from_pylist([{"text": f"some text {n}" * 5, "n": n} for n in range(400)]), whole)
    content, refused = whole.read_bytes(), 0
    for seed in range(60):
        random = Random(seed)
        damaged = bytearray(content[: random.randrange(len(content))] if seed % 4 == 0 else content)
        for _ in range(8):
            if damaged:
                damaged[random.randrange(len(damaged))] = random.randrange(256)
        path = tmp_path / "a.parquet"
        path.write_bytes(damaged)
        try:
            for row in read_rows(str(path)):
                row.text("text")
        except InputError as error:
            refused += 1
            assert "a.parquet" in str(error) and len(str(error)) < 600
    assert refused > 20


def test_cells_may_be_long_and_the_limit_of_other_code_stays(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", f'text\n{"x" * 200_000}\n"{"y" * 300_000}"\n')
    assert [len(row.values["text"]) for row in read_rows(path)] == [200_000, 300_000]
    assert csv.field_size_limit() == before
    rows = read_file(Path(path))
    next(rows)
    assert csv.field_size_limit() == before, "also between two rows"


@pytest.mark.parametrize("source", ["", ":test", "#config"])
def test_a_source_without_a_name_is_refused(source):
    with pytest.raises(InputError, match=f"^'{source}' does not name a data set: give a .jsonl, .json, .csv"):
        read_rows(source)


def test_paths_that_are_no_files_say_what_they_are(tmp_path):
    (tmp_path / "dir.jsonl").mkdir()
    for source, reason in {
        str(tmp_path / "dir.jsonl"): "dir.jsonl is a folder: check the path, and give a .jsonl, .json",
        "~nobody-of-this-name/a.jsonl": "there is no such home folder",
        "~nobody-of-this-name/a": "there is no such home folder",
        "x" * 5000 + ".csv": "File name too long",
        "a\0b.csv": "is not a valid file name",
        str(tmp_path / "none.jsonl"): "does not exist",
    }.items():
        with pytest.raises(InputError, match=reason) as caught:
            read_rows(source)
        assert len(str(caught.value)) < 600
    for source in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="cannot load"):
            read_rows(source)


@pytest.mark.parametrize(("name", "good"), [("a.jsonl", '{{"text": "{}"}}'), ("a.csv", "{}")])
def test_a_line_that_is_not_utf_8_is_one_bad_row(tmp_path, name, good):
    rows = [good.format(text).encode() for text in ("one", "zwölf", "three")]
    header = [] if name == "a.jsonl" else [b"text"]
    (tmp_path / name).write_bytes(b"\n".join([*header, rows[0], good.format("caf\u00e9").encode("latin-1"), *rows[1:]]))
    errors = []
    found = [row.values["text"] for row in read_rows(str(tmp_path / name), bad=errors.append)]
    assert found == ["one", "zwölf", "three"]
    (error,) = map(str, errors)
    assert f"line {2 + len(header)}: not UTF-8 text (byte 0xe9 after " in error and "caf'" in error


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_header_of_a_csv_file_says_what_separates_its_cells(tmp_path, mark):
    text = f'text{mark}label\n"1,5; 2\t3"{mark}yes\n'
    assert [row.values for row in read_rows(write(tmp_path / "a.csv", text))] == [{"text": "1,5; 2\t3", "label": "yes"}]
    assert read_rows(write(tmp_path / "b.csv", "text\na\n"))[0].values == {"text": "a"}


def test_parquet_gives_rows_and_nested_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    values = [{"text": f"t{n}", "context": {"contexts": ["a", f"b{n}"]}} for n in range(600)]
    path = tmp_path / "a.parquet"
    write_table(pyarrow.Table.from_pylist(values), path)
    rows = read_rows(str(path))
    assert [row.values for row in rows] == values and rows[-1].where.endswith("a.parquet, row 599")
    assert rows[1].texts("context.contexts", 2) == ["a", "b1"]
    assert len(read_rows(str(path), limit=300)) == 300
    path.write_bytes(b"not a table")
    with pytest.raises(InputError, match="a.parquet: not a Parquet file"):
        read_rows(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_limit_leaves_the_rest_unread(tmp_path, name):
    text = '{"text": "a"}\n{"text": "b"}\nbroken' if name.endswith("jsonl") else 'text\na\nb\n"broken\n'
    path = write(tmp_path / name, text)
    assert [row.values["text"] for row in read_rows(path, limit=2)] == ["a", "b"]
    with pytest.raises(InputError):
        read_rows(path)


def test_folder_goes_through_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    assert [row.values["text"] for row in read_rows(f"{tmp_path / 'set'}:train")] == ["a", "b"]
    assert [row.values["text"] for row in read_rows(f"{tmp_path / 'set'}:train", limit=1)] == ["a"]
    with pytest.raises(InputError, match="cannot load"):
        read_rows(f"{tmp_path / 'set'}:validation")


def test_hub_name_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        read_rows("owner/name")


@pytest.mark.parametrize("kind", ["new_file", "new_stream"])
def test_arrow_in_both_forms_and_damaged(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    values = [{"text": f"{n % 7}{n % 7}"} for n in range(1000)]
    table, path = pyarrow.Table.from_pylist(values), tmp_path / "a.arrow"
    with getattr(pyarrow.ipc, kind)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    rows = read_rows(str(path))
    assert [row.values for row in rows] == values and rows[-1].where.endswith("a.arrow, row 999")
    content = path.read_bytes()
    ends = b"".join(number.to_bytes(4, "little") for number in (2, 4, 6))
    # Unchecked, the second text would be 2 GB of whatever lies behind.
    elsewhere = ends[:4] + (2**31 - 8).to_bytes(4, "little") + ends[8:]
    assert ends in content
    for damaged in (content[:500], content.replace(ends, elsewhere)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="a.arrow: not an Arrow file, or a damaged one .*rewrite it"):
            read_rows(str(path))


def packed(path, text):
    path.write_bytes(gzip.compress(text.encode()))
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl.gz", '{"text": "' + "x" * 2**25 + '"}'),
        ("a.jsonl.gz", ('{"text": "' + "x" * 1000 + '"}\n') * 2**15),
        ("a.json.gz", "[" + "{}," * 2**23 + "{}]"),
        ("a.json.gz", " " * 2**25),
        ("a.csv.gz", "text\n" + ("x" * 1000 + "\n") * 2**15),
    ],
    ids=range(5),
)
def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path, name, text):
    source = packed(tmp_path / name, text)
    assert Path(source).stat().st_size < 120_000
    with pytest.raises(InputError, match=rf"{name}: unpacks to more than 100 times its size and 16 MiB"):
        for _ in read_file(Path(source)):
            pass


def test_repetitive_texts_are_no_bombs(tmp_path):
    lines = "\n".join(f'{{"text": "{"the same text again " * 20}{n}"}}' for n in range(20_000))
    assert len(read_rows(packed(tmp_path / "a.jsonl.gz", lines))) == 20_000


def test_a_list_of_objects_is_read_one_at_a_time(tmp_path):
    path = Path(write(tmp_path / "a.json", "[" + "{}," * 30_000 + "{}]"))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_file(path)) == 30_001
        assert tracemalloc.get_traced_memory()[1] < 4e5, "as objects they take 2 MB"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_that_would_not_fit_in_memory_as_objects_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr("atp.data.formats._LONGEST_ROW", 1000)
    whole = '{"text": "' + "x" * 988 + '"}' if name == "a.jsonl" else "text\n" + "x" * 999
    assert len(read_rows(write(tmp_path / name, whole))) == 1
    with pytest.raises(InputError, match=f"{name}, line .: longer than 1,000 characters; write one document per line"):
        read_rows(write(tmp_path / name, whole.replace("xx", "xxxx")))


BIG = "x" * 100_000


@pytest.mark.parametrize(
    ("columns", "refusal"),
    [
        ({"text": [BIG] * 2000}, "unpacks to more than 1000 times its size"),
        ({"turns": [[{"role": "user", "content": BIG}] * 2000]}, "unpacks to more than 1000 times its size"),
        ({"text": ["x" * 3 * 2**23]}, "unpacks to more than 100 times its size"),
        ({"n": [0] * 200_000}, "200,000 rows in"),
    ],
    ids=["dictionary", "nested", "page", "rows"],
)
def test_a_small_table_that_unfolds_to_much_is_refused(tmp_path, columns, refusal):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "a.parquet"
    write_table(pyarrow.table(columns), path, compression="zstd")
    assert path.stat().st_size < 10_000
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(InputError, match=f"a.parquet: {refusal}"):
        for _ in read_file(path):
            assert pyarrow.total_allocated_bytes() - before < 2**25


def test_a_script_beside_the_data_is_not_run(tmp_path, monkeypatch):
    folder, ran = tmp_path / "corpus", tmp_path / "ran"
    folder.mkdir()
    (folder / "corpus.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    with pytest.raises(InputError, match="cannot load"):
        read_rows(str(folder))
    assert not ran.exists()
