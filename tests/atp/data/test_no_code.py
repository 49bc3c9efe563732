"""Loading a data set runs nothing that comes with it."""

import builtins

import pytest

from atp.data.files import read_rows
from atp.ground.errors import InputError


def test_a_script_beside_the_data_is_not_run(tmp_path, monkeypatch):
    folder, ran = tmp_path / "corpus", tmp_path / "ran"
    folder.mkdir()
    (folder / "corpus.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    with pytest.raises(InputError, match="cannot load"):
        read_rows(str(folder))
    assert not ran.exists()
