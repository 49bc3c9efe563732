"""Rows that a run leaves out: said at the start, listed in its folder."""

from pathlib import Path

import pytest
from tiny_command import start, stopping_at

from atp.ground.errors import InputError
from atp.inputs.folders import refuse_inputs_inside
from atp.run import Run


def test_skipped_rows_are_shown_and_listed(config, tmp_path):
    good = Path(config.data.train).read_text(encoding="utf-8").splitlines()
    bad = ["{", '{"prompt": "the"}', *(f'{{"prompt": "the {n}", "completion": " maybe"}}' for n in range(12))]
    (tmp_path / "data.jsonl").write_text("\n".join(good + bad), encoding="utf-8")
    options = {"data": {"train": str(tmp_path / "data.jsonl"), "on_error": "skip"}}
    said = []
    with stopping_at(Run, "_score"):
        start(config, tmp_path / "out", say=said.append, **options)
    assert said[0].endswith("; 14 rows skipped")
    assert said[1].startswith("skipped: ") and "data.jsonl, line 61: not valid JSON" in said[1]
    assert sum(line.startswith("skipped: ") for line in said) == 10 and said[11] == "and 4 more"
    listed = (tmp_path / "out" / "skipped_rows.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 14 and "line 74: label 'maybe' is not one of yes, no; correct the row" in listed[-1]
    with pytest.raises(InputError, match="line 61: not valid JSON"):
        start(config, tmp_path / "other", data=options["data"] | {"on_error": "stop"})
    assert not (tmp_path / "other").exists()


def test_every_source_is_kept_from_the_runs_own_folders(config, tmp_path):
    inside = tmp_path / "model" / "a.jsonl"
    inside.parent.mkdir()
    inside.touch()
    for given in ({config.data.train: 2, str(inside): 1}, [config.data.train, str(inside)]):
        changed = config.model_copy(update={"data": config.data.model_copy(update={"train": given})})
        with pytest.raises(InputError, match="^data.train .*a.jsonl lies in"):
            refuse_inputs_inside(changed, tmp_path)
