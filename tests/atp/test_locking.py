"""One process in a folder at a time, and no folder left behind by a start that failed."""

import errno
import fcntl
import os
import shutil

import pytest
from tiny_command import another_process, start

from atp import run as runs
from atp.config import ExportConfig
from atp.ground.errors import InputError
from atp.ground.locking import holder, locked
from atp.studies.compare import Comparison
from atp.studies.compare.members import Members
from atp.studies.experiments import Experiment


def test_a_lock_file_alone_means_nothing_and_a_second_process_is_refused_by_the_name_of_the_first(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff process 1 on nowhere")
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with another_process(locked(tmp_path)) as child:
        with pytest.raises(InputError, match=rf"^{tmp_path} is in use by process {child} on \S+: wait until"):
            with locked(tmp_path):
                pytest.fail("both hold it")
    with locked(tmp_path):
        pass


def _links_to(target):
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize("make", [_links_to("../texts.jsonl"), _links_to("../nowhere"), os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file_is_refused_and_nothing_is_written_through_it(tmp_path, make):
    (tmp_path / "texts.jsonl").write_text("precious")
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / ".lock")
    assert holder(tmp_path / "out") is None
    with pytest.raises(InputError, match=r"\.lock is a link or no file, so nothing is written to it: remove it"):
        with locked(tmp_path / "out"):
            pytest.fail("locked")
    assert (tmp_path / "texts.jsonl").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["out", "texts.jsonl"]


def test_a_lock_that_is_a_second_name_of_a_file_leaves_the_file_as_it_is(tmp_path):
    (tmp_path / "texts.jsonl").write_text("precious")
    (tmp_path / ".lock").hardlink_to(tmp_path / "texts.jsonl")
    with locked(tmp_path), pytest.raises(InputError, match="in use by"), locked(tmp_path):
        pytest.fail("both hold it")
    assert (tmp_path / "texts.jsonl").read_text() == "precious"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_worked_on_without(tmp_path, monkeypatch, code):
    def flock(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        pass


def test_runs_and_comparisons_hold_their_folders(config, tmp_path):
    run, comparison = tmp_path / "run", tmp_path / "comparison"
    for folder in (run, comparison):
        folder.mkdir()
    kept = config.model_copy(update={"output_dir": str(run), "export": ExportConfig(keep_adapter=True)})
    (run / "config.yaml").write_text(kept.dump())
    (comparison / "comparison.yaml").write_text(Members(config, comparison, command="atp").config.dump())
    for folder, started in ((run, start), (comparison, compare)):
        with another_process(locked(folder)) as child, pytest.raises(InputError, match=f"in use by process {child}"):
            started(config, folder, resume=True)


def compare(config, folder, resume=False, **overrides):
    values = config.model_dump(mode="json")
    for section, keys in overrides.items():
        values[section] |= keys
    config = type(config).parse(values)
    Comparison(config, ["atp"], [0], folder, resume=resume, command="atp compare").execute()


def experiment(config, folder, **overrides):
    (folder.parent / "base.yaml").write_text(config.dump())
    (folder.parent / "question.yaml").write_text("question: Which?\ndomains: [custom]\narms: [{method: atp}]\n")
    settings = [f"{section}.{key}={value}" for section, keys in overrides.items() for key, value in keys.items()]
    Experiment(
        str(folder.parent / "question.yaml"), settings, runs=folder, out=folder.parent / "results", command="atp",
    ).execute()  # fmt: skip


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        (start, {"data": {"length": 3000}}), (start, {"model": {"path": "/nowhere"}}),
        (compare, {"data": {"train": "nowhere.jsonl"}}), (experiment, {"data": {"length": 3000}}),
    ],
)  # fmt: skip
def test_what_fails_its_checks_leaves_no_folder(config, tmp_path, command, wrong):
    folder = tmp_path / ("out" if command is experiment else "deep/out")
    with pytest.raises(InputError):
        command(config, folder, **wrong)
    assert not (tmp_path / "deep").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [compare, experiment])
def test_no_command_writes_over_its_own_model(config, tmp_path, command):
    model = shutil.copytree(config.model.path, tmp_path / "out" / "custom" / "model")
    with pytest.raises(InputError, match="which the run writes to and would overwrite"):
        if command is compare:
            (tmp_path / "out" / "comparison.yaml").write_text(config.dump())
            compare(config, tmp_path / "out", resume=True, model={"path": str(model)})
        else:
            experiment(config, tmp_path / "out", model={"path": str(model)})
    assert sorted(path.name for path in model.iterdir()) == sorted(os.listdir(config.model.path))


@pytest.mark.parametrize("command", [start, compare])
def test_what_fails_later_but_left_nothing_of_its_own_does_not_block_the_next(config, tmp_path, monkeypatch, command):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "evaluate_model", fail)
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine", tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            command(config, folder)
    assert not list((tmp_path / "mine").iterdir()) and not (tmp_path / "new").exists()
