"""CSV files of results: rows are added and never lost."""

import pytest
import torch

from atp_kernels.tuning import table
from benchmarks.records import append, environment, read


def test_rows_are_appended(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    append(path, [{"a": 1, "b": "x, y"}])
    append(path, [{"a": 2, "b": 'say "z"'}, {"a": 3, "b": ""}])
    assert read(path) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": 'say "z"'}, {"a": "3", "b": ""}]
    assert path.read_text().splitlines()[0] == "a,b"


def test_a_new_column_keeps_old_rows_and_old_columns(tmp_path):
    path = tmp_path / "rows.csv"
    append(path, [{"a": 1, "b": 2}])
    append(path, [{"c": 3, "a": 4}])
    append(path, [{"a": 5, "b": 6, "c": 7}])
    assert read(path) == [
        {"a": "1", "b": "2", "c": ""}, {"a": "4", "b": "", "c": "3"}, {"a": "5", "b": "6", "c": "7"},
    ]  # fmt: skip
    assert [child.name for child in tmp_path.iterdir()] == ["rows.csv"]


def test_an_interrupted_rewrite_leaves_the_old_rows(tmp_path):
    path = tmp_path / "rows.csv"
    append(path, [{"a": 1}])

    class Unprintable:
        def __str__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        append(path, [{"a": 2, "b": Unprintable()}])
    assert read(path) == [{"a": "1"}]


def test_rows_say_where_they_are_from():
    where = environment("cpu")
    assert {"device", "threads", "python", "torch", "triton", "commit", "tables"} == where.keys()
    assert all(where.values())


def test_rows_say_whether_a_tuned_table_is_read(tmp_path, monkeypatch):
    cpu, key = torch.device("cpu"), table.Key("cut", "float32", 8, 4, 4, 2)
    monkeypatch.setenv(table.ENVIRONMENT, str(tmp_path))
    table.tables_of.cache_clear()
    try:
        assert environment("cpu")["tables"] == "none"
        table.write(tmp_path / table.file_name(cpu), cpu, [table.Entry(key, "reference", None, {"reference": 1.0})])
        assert environment("cpu")["tables"] == "1"
    finally:
        table.tables_of.cache_clear()
