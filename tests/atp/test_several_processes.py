"""A run in two processes: it ends, is written once, survives a signal, and equals a run in one process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file

from atp import processes
from atp.errors import InputError

pytestmark = pytest.mark.slow

STEPS = 8  # search 4, settle 2, tune 2
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(arguments, *, several=True, environment=None):
    command = [*(LAUNCH if several else [sys.executable]), "-m", "atp", *arguments]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def ended(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def settings(config, tmp_path_factory):
    """A YAML file for runs of one process with two micro-batches a step, and the same for two processes."""
    values = config.model_dump(mode="json")
    values["lora"]["dropout"] = 0.0
    values["training"] |= {"search": 4, "settle": 2, "tune": 2, "save_every": 1}
    values["evaluation"] |= {"dense_baseline": False, "windows": 2, "questions": 2}
    folder = tmp_path_factory.mktemp("settings")
    paths = []
    for name, accumulation in (("several", 1), ("one", 2)):
        values["training"]["gradient_accumulation"] = accumulation
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(values), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    """The folder of the run in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    ended(start(["train", str(settings[1]), f"output_dir={folder}"], several=False))
    return folder


def assert_equal(folder, expected):
    for name in ("decisions.safetensors", "model/model.safetensors"):
        found, wanted = load_file(folder / name), load_file(expected / name)
        assert found.keys() == wanted.keys()
        for key in found:
            assert found[key].equal(wanted[key]), f"{name}: {key}"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (folder, expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not list(folder.rglob(".writing-*"))


def test_a_fresh_run_equals_that_of_one_process_and_prints_once(settings, one, tmp_path):
    folder = tmp_path / "run"
    output = ended(start(["train", str(settings[0]), f"output_dir={folder}"]))
    assert_equal(folder, one)
    assert output.count("exporting and certifying") == 1
    assert output.count("target_keep:") == 1
    assert output.count("What one stage did") == 1


def test_an_interrupted_run_is_resumed_in_two_processes(settings, one, tmp_path):
    folder = tmp_path / "run"
    process = start(["train", str(settings[0]), f"output_dir={folder}", "training.log_every=1"])
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (folder / "summary.json").exists(), "the signal came too late to test anything"
    assert output.count("interrupted by signal 15") >= 1, output
    ended(start(["train", str(settings[0]), f"output_dir={folder}", "--resume"]))
    assert_equal(folder, one)


def test_bad_input_ends_all_processes_before_anything_is_written(settings, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep", encoding="utf-8")
    process = start(["train", str(settings[0]), f"output_dir={folder}"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "is not empty" in output
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_sharded_weights_are_refused_in_one_sentence(settings, tmp_path):
    process = start(
        ["train", str(settings[0]), f"output_dir={tmp_path / 'run'}"], several=False,
        environment={"ACCELERATE_USE_FSDP": "true"},
    )  # fmt: skip
    output = ended(process, code=2)
    assert "FSDP shards weights" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_one_process_alone_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.wait()
    assert processes.is_main()
    assert processes.on_main(lambda: 3) == 3
    assert processes.largest(15) == 15
    with pytest.raises(InputError):
        processes.on_main(lambda: (_ for _ in ()).throw(InputError("bad")))
