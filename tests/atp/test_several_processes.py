"""Runs in several processes, whole or in shards: they end, survive signals and kills, and equal one in one process."""

import os
import re
import shutil
import signal

import psutil
import pytest
from launched_runs import assert_equal, end_of_each, ended, start, wait_for_steps, write_settings
from tiny_folder import edited, moved_weights
from transformers import LlamaConfig

from atp.config import ATPConfig
from atp.ground.errors import InputError
from atp.inputs.checks import check_sharded, sharding_remark
from atp.inputs.loading import load_model
from atp.processes import processes


@pytest.fixture(scope="module")
def settings(config, tmp_path_factory):
    return write_settings(config, tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
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
    assert output.count("\nmodel: ") == 1
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
    assert output.count("\nmodel: ") == 2, "the kill came too late to test anything"
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


# What the second process has that the first has not: a change of its files, or arguments.
TURNED = edited("data.jsonl", "heart rate", "rate heart")
OTHERS = {
    "data": (TURNED, [], "reads other train data"),
    "data that set the length": (TURNED, ["training.tokens=700", "training.tune=null"], "reads other train data"),
    "weights": (moved_weights, [], "reads other base weights than"),
    "weights in shards": (moved_weights, ["training.sharding=fsdp"], "reads other model.safetensors than"),
    "tokenizer": (edited("tokenizer.json", '"heart"', '"hearts"'), [], "reads other tokenizer"),
    "sharding": (None, ["training.sharding=fsdp"], "was started with other training.sharding than"),
    "settings": (None, ["training.lr=1e-3", "seed=1"], "was started with other seed, training.lr than"),
    "resume": (None, ["--resume"], "was started with other --resume than"),
    "seeds": (None, ["--seeds", "0,1"], "was started with other --seeds than"),
    "methods": (None, ["--methods", "magnitude"], "was started with other --methods than"),
}


def differing(name, settings, config, folder):
    change, extra, _ = OTHERS[name]
    folders = [folder / name / place for place in ("here", "there")]
    for place in folders:
        shutil.copytree(config.model.path, place / "inputs")
    command = ["train", str(settings[0]), "model.path=inputs", "data.train=inputs/data.jsonl"]
    command.append(f"output_dir={folder / name / 'run'}")
    if name in ("seeds", "methods"):
        command = ["compare", *command[1:], "--methods", "random", "--seeds", "0", "--out", str(folder / name / "run")]
    if change is None:
        commands = [command, [*command, *extra]]
    else:
        change(folders[1] / "inputs")
        commands = [[*command, *extra]] * 2
    return {"commands": commands, "folders": list(map(str, folders))}


@pytest.fixture(scope="module")
def disagreements(settings, config, tmp_path_factory):
    """How each case ended: (exit codes, output, whether anything was written)."""
    folder = tmp_path_factory.mktemp("machines")
    ends = end_of_each([differing(name, settings, config, folder) for name in OTHERS])
    return {name: (*end, (folder / name / "run").exists()) for name, end in zip(OTHERS, ends, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_processes_that_differ_end_with_one_sentence_that_says_in_what(disagreements, name):
    codes, output, written = disagreements[name]
    assert codes == [2, 2] and not written, output
    (line,) = re.findall(r"^(?:process \d+: )?error: .*", output, re.MULTILINE)
    assert re.match(rf"error: process 1 on \S+ {OTHERS[name][2]}", line) and " process 0 on " in line, line


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


@pytest.fixture
def shared(monkeypatch):
    """As in one of two processes that share the weights."""
    monkeypatch.setattr(processes, "_sharded", True)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP with offloading"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism"),
    ],
)
def test_other_ways_to_spread_a_model_are_refused(variables, named, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{named}.* is not supported: start the run with .*training.sharding=fsdp"):
        processes.start()


def test_one_process_alone_shares_nothing_and_says_so_where_it_is_asked_to(monkeypatch, config):
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "1")
    processes.start("fsdp")
    assert not processes.sharded()
    asked = ATPConfig.parse(config.model_dump(mode="json"), ["training.sharding=fsdp"])
    (said,) = sharding_remark(asked, 1)
    assert said.startswith("training.sharding=fsdp shares weights among processes, and one process holds them whole")
    assert sharding_remark(asked, 2) == sharding_remark(config, 1) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.dense_baseline=true"], "evaluation.dense_baseline trains a model of its own"),
        (["lora.variant=dora", "training.search=0", "training.settle=0"], "lora.variant=dora reads the norms of whole"),
    ],
)
def test_settings_that_need_whole_weights_are_refused(config, shared, overrides, message):
    values = config.model_dump(mode="json")
    values["evaluation"]["dense_baseline"] = False
    check_sharded(ATPConfig.parse(values))
    with pytest.raises(InputError, match=message):
        check_sharded(ATPConfig.parse(values, overrides))


def test_a_gguf_file_is_refused(config, shared, monkeypatch):
    monkeypatch.setattr("atp.inputs.loading.load_shapes", lambda model: LlamaConfig())
    monkeypatch.setattr("atp.inputs.loading.check_prunable", lambda *arguments: None)
    source = {"path": "x", "gguf_file": "x.gguf", "revision": None}
    monkeypatch.setattr("atp.inputs.loading._source", lambda model: source)
    with pytest.raises(InputError, match="is a GGUF file, which cannot be read in shards: save the model as"):
        load_model(config.model, config.decisions.space)


CLOCKS = """
import os
import atp.cli.cli
from atp.evaluation import speed
speed._narrow = lambda rounds: len(rounds) >= 3 + int(os.environ["RANK"])
atp.cli.cli.main()
"""


@pytest.mark.slow
def test_a_sharded_run_equals_that_of_one_process(config, tmp_path):
    """Though each process has a clock of its own, and would end its rounds of timing at another time."""
    settings, program = write_settings(config, tmp_path), tmp_path / "clocks.py"
    program.write_text(CLOCKS)
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as `accelerate launch --use_fsdp --fsdp_version 2`
    command = ["train", str(settings[0]), f"output_dir={tmp_path / 'two'}"]
    ended(start(command, environment=asked, program=[str(program)]))
    ended(start(["train", str(settings[1]), f"output_dir={tmp_path / 'one'}"], two=False))
    assert_equal(tmp_path / "two", tmp_path / "one")
    assert len(list((tmp_path / "two" / "model").glob("model-*.safetensors"))) > 1
