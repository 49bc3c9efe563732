"""Training seconds of a baseline: choosing, removing with its refit, and tuning, of a resumed run too."""

import time

import pytest

from atp.baselines import methods
from atp.studies.compare import baseline_run
from atp.studies.compare.baseline_run import BaselineRun


def run(config, folder, resume):
    values = config.model_dump(mode="json") | {"output_dir": str(folder)}
    settings = type(config).parse(values)
    return BaselineRun("static", settings, resume=resume, command="atp compare", say=lambda line: None)


def test_the_time_of_the_refit_counts(config, tmp_path, monkeypatch):
    refit = methods.refit_readers

    def slow(*args):
        time.sleep(0.7)
        refit(*args)

    monkeypatch.setattr(methods, "refit_readers", slow)
    seconds = run(config, tmp_path, resume=False).execute()["seconds"]
    assert set(seconds) == {"choose", "apply", "tune", "total"}
    assert seconds["apply"] > 0.7
    assert seconds["total"] > seconds["choose"] + seconds["apply"] + seconds["tune"]


def test_a_resumed_run_counts_choosing_once_and_removing_again(config, tmp_path, monkeypatch):
    first = run(config, tmp_path, resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(baseline_run, "export_model", stop)
        with pytest.raises(Stopped):
            first.execute()
    choosing = first._scores()["choice"]["seconds"]
    seconds = run(config, tmp_path, resume=True).execute()["seconds"]
    assert seconds["choose"] == choosing and seconds["apply"] > 0 and seconds["tune"] > 0


class Stopped(Exception):
    """Ends a run before its export."""


def stop(*_args):
    raise Stopped
