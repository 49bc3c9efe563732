"""Reading user files: every mistake is one sentence with file, line and remedy."""

import sys

import pytest

from atp.data.files import read_rows
from atp.errors import InputError


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


def test_wrong_encoding_and_missing_file(tmp_path):
    with pytest.raises(InputError, match="not UTF-8"):
        read_rows(write(tmp_path / "a.csv", "text\né\n", "latin-1"))
    with pytest.raises(InputError, match="does not exist"):
        read_rows(str(tmp_path / "none.jsonl"))


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
