"""What sharded training refuses, and a whole `atp train` in two processes that accelerate's FSDP 2 asks for."""

import pytest
from launched_runs import assert_equal, ended, start, write_settings

from atp.config import ATPConfig
from atp.ground.errors import InputError
from atp.inputs.checks import check_sharded, sharding_remark
from atp.inputs.loading import load_model
from atp.processes import processes


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
        (["training.distill=0.5", "training.open=2"], "training.distill holds a whole model in every process"),
        (["evaluation.dense_baseline=true"], "evaluation.dense_baseline trains a model of its own"),
    ],
)
def test_settings_that_need_whole_weights_are_refused(config, shared, overrides, message):
    values = config.model_dump(mode="json")
    values["evaluation"]["dense_baseline"] = False
    check_sharded(ATPConfig.parse(values))
    with pytest.raises(InputError, match=message):
        check_sharded(ATPConfig.parse(values, overrides))


def test_a_gguf_file_is_refused(config, shared, monkeypatch):
    monkeypatch.setattr("atp.inputs.loading.load_shapes", lambda model: None)
    monkeypatch.setattr("atp.inputs.loading.check_prunable", lambda *arguments: None)
    source = {"path": "x", "gguf_file": "x.gguf", "revision": None}
    monkeypatch.setattr("atp.inputs.loading._source", lambda model: source)
    with pytest.raises(InputError, match="is a GGUF file, which cannot be read in shards: save the model as"):
        load_model(config.model, config.decisions.space)


@pytest.mark.slow
def test_a_sharded_run_equals_that_of_one_process(config, tmp_path):
    settings = write_settings(config, tmp_path)
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as `accelerate launch --use_fsdp --fsdp_version 2`
    ended(start(["train", str(settings[0]), f"output_dir={tmp_path / 'two'}"], environment=asked))
    ended(start(["train", str(settings[1]), f"output_dir={tmp_path / 'one'}"], two=False))
    assert_equal(tmp_path / "two", tmp_path / "one")
    assert len(list((tmp_path / "two" / "model").glob("model-*.safetensors"))) > 1
