"""Reading user files: every mistake is one sentence with file, line and remedy."""

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
    assert read_rows(jsonl)[1].where.endswith("a.jsonl, line 3")


def test_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    assert read_rows(write(tmp_path / "a.csv", "text\nhello\n", "utf-8-sig"))[0].values == {"text": "hello"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.csv", "text\n", "is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2: not valid JSON"),
        ("a.jsonl", '["a"]', "line 1: a list, not an object"),
        ("a.csv", "prompt,completion\na,b\nc\n", "line 3: not 2 fields"),
        ("a.csv", "prompt,completion\na,b,c\n", "line 2: not 2 fields"),
        ("a.csv", 'text\n"open\n', "JSONL instead"),
        ("a.txt", "hello", "unknown file type '.txt'"),
    ],
)
def test_malformed_files(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        read_rows(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": ' + "[" * 10**5, "line 1: not valid JSON .nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "line 1: not valid JSON .a number with thousands of digits"),
        ('{"text": "a", "other": "\\ud800"}', "line 1: not valid JSON .an escape .* without its other half"),
        ('{"text": NaN}', "line 1: column 'text' holds nan, not text"),
        ('{"text": ' + "[" * 900 + "]" * 900 + "}", "line 1: column 'text' holds .*not text"),
        ('{"text": ["' + "x" * 10**6 + '"]}', "line 1: column 'text' holds .*not text"),
        ('{"' + "x" * 10**6 + '": 1}', r"line 1: column 'text' is missing \(found: x+\.\.\.\)"),
        ("{" + ", ".join(f'"{n}": 1' for n in range(10**5)) + "}", r"line 1: column 'text' is missing \(found: 0, 1,"),
    ],
    ids=range(8),
)
def test_damaged_json_is_one_short_sentence(tmp_path, line, reason):
    with pytest.raises(InputError, match=f"a.jsonl, {reason}") as caught:
        read_rows(write(tmp_path / "a.jsonl", line))[0].text("text")
    assert len(str(caught.value)) < 600


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
    }.items():
        with pytest.raises(InputError, match=reason) as caught:
            read_rows(source)
        assert len(str(caught.value)) < 600
    for source in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="cannot load"):
            read_rows(source)


def test_wrong_encoding_and_missing_file(tmp_path):
    with pytest.raises(InputError, match="not UTF-8"):
        read_rows(write(tmp_path / "a.csv", "text\né\n", "latin-1"))
    with pytest.raises(InputError, match="does not exist"):
        read_rows(str(tmp_path / "none.jsonl"))


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


def test_nested_column_errors(tmp_path):
    row = read_rows(write(tmp_path / "a.jsonl", '{"a": {"b": ["x", 1], "c": ["x"]}, "t": "x"}'))[0]
    with pytest.raises(InputError, match=r"column 'a.d' is missing \(found: b, c\)"):
        row.text("a.d")
    with pytest.raises(InputError, match=r"column 't.b' is missing \(found: none\)"):
        row.text("t.b")
    with pytest.raises(InputError, match=r"column 'a.b' holds \['x', 1\], not a list of texts"):
        row.texts("a.b")
    with pytest.raises(InputError, match="column 'a.c' holds 1 texts, not 2"):
        row.texts("a.c", 2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_limit_leaves_the_rest_unread(tmp_path, name):
    text = '{"text": "a"}\n{"text": "b"}\nbroken' if name.endswith("jsonl") else 'text\na\nb\n"broken\n'
    path = write(tmp_path / name, text)
    assert [row.values["text"] for row in read_rows(path, limit=2)] == ["a", "b"]
    with pytest.raises(InputError):
        read_rows(path)


def test_column_errors_name_the_columns_found(tmp_path):
    row = read_rows(write(tmp_path / "a.jsonl", '{"x": "1", "y": 2}'))[0]
    with pytest.raises(InputError, match=r"a.jsonl, line 1: column 'text' is missing \(found: x, y\)"):
        row.text("text")
    with pytest.raises(InputError, match="column 'y' holds 2, not text"):
        row.text("y")


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
def test_an_arrow_file_whose_offsets_point_elsewhere_is_refused(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["aa", "bb", "cc"]})
    path = tmp_path / "a.arrow"
    with getattr(pyarrow.ipc, kind)(str(path), table.schema) as writer:
        writer.write_table(table)
    assert len(read_rows(str(path))) == 3
    ends = [number.to_bytes(4, "little") for number in (2, 4, 6)]
    content = path.read_bytes()
    assert content.count(b"".join(ends)) == 1
    # Unchecked, the second text would be 2 GB of whatever lies behind.
    path.write_bytes(content.replace(b"".join(ends), ends[0] + (2**31 - 8).to_bytes(4, "little") + ends[2]))
    with pytest.raises(InputError, match="not an Arrow file, or a damaged one .*rewrite it"):
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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[]", []), (' [ ] ', []), ('[{"a": "[1, 2]"} , {"a": {"b": []}}]\n', [{"a": "[1, 2]"}, {"a": {"b": []}}]),
        ("[{}", "delimiter at character 4"), ("[{} {}]", "delimiter at character 5"), ("[", "value at character 2"),
        ("[{},]", "value at character 5"), ("[{}] x", "Extra data at character 6"), ("[" * 10**5, "too deeply"),
        ('[{"a": "\\ud800"}]', "without its other half"), ('[{"a": ' + "9" * 5000 + "}]", "thousands of digits"),
        ("[{}, 3]", "row 1: 3, not an object"),
    ],
)  # fmt: skip
def test_lists_of_objects(tmp_path, text, found):
    path = Path(write(tmp_path / "a.json", text))
    if isinstance(found, list):
        assert [row.values for row in read_file(path)] == found
        return
    with pytest.raises(InputError, match=found):
        list(read_file(path))


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
