"""A run in two processes: it ends, is written once, survives a signal and a kill, and equals a run in one process."""

import os
import signal

import psutil
import pytest
from launched_runs import assert_equal, ended, start, wait_for_steps, write_settings

from atp import processes
from atp.errors import InputError


@pytest.fixture(scope="module")
def settings(config, tmp_path_factory):
    return write_settings(config, tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    """The folder of the run in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    ended(start(["train", str(settings[1]), f"output_dir={folder}"], two=False))
    return folder


@pytest.fixture(scope="module")
def two(settings, tmp_path_factory):
    """The folder of a run in two processes that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, ended(start(["train", str(settings[0]), f"output_dir={folder}"]))


@pytest.mark.slow
def test_a_fresh_run_equals_that_of_one_process_and_prints_once(one, two):
    folder, output = two
    assert_equal(folder, one)
    assert output.count("exporting and certifying") == 1
    assert output.count("target_keep:") == 1
    assert output.count("Result") == 1


@pytest.mark.slow
def test_a_run_that_two_processes_began_ends_in_one(settings, one, tmp_path):
    folder = tmp_path / "run"
    process = start(["train", str(settings[0]), f"output_dir={folder}"])
    wait_for_steps(process, folder, 2)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (folder / "summary.json").exists(), "the signal came too late to test anything"
    assert output.count("interrupted by signal 15") >= 1, output
    ended(start(["train", str(settings[0]), f"output_dir={folder}", "--resume"], two=False))
    assert_equal(folder, one)


@pytest.mark.slow
def test_a_run_goes_on_by_itself_where_torchrun_starts_a_killed_process_again(settings, two, tmp_path):
    folder = tmp_path / "run"
    command = ["train", str(settings[0]), f"output_dir={folder}"]
    process = start(command, launcher=["--max-restarts", "2"])
    wait_for_steps(process, folder, 2)
    psutil.Process(process.pid).children()[0].kill()
    output = ended(process)
    assert output.count("target_keep:") == 2, "the kill came too late to test anything"
    assert "Traceback" not in output and "gloo" not in output
    assert_equal(folder, two[0])
    for name in ("decisions.safetensors", "decisions.json", "certificate.json", "model/*.safetensors"):
        for path in two[0].glob(name):
            assert (folder / path.relative_to(two[0])).read_bytes() == path.read_bytes(), path


@pytest.mark.slow
def test_bad_input_ends_all_processes_and_is_told_once(settings, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep", encoding="utf-8")
    output = ended(start(["train", str(settings[0]), f"output_dir={folder}"]), code=1)  # torchrun's own exit code
    assert output.count("is not empty") == 1
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_one_process_alone_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.wait()
    assert processes.is_main()
    assert processes.on_main(lambda: 3) == 3
    assert processes.main_first(lambda: 4) == 4
    assert processes.largest(15) == 15

    def refuse():
        raise InputError("bad")

    with pytest.raises(InputError, match="bad"):
        processes.on_main(refuse)
