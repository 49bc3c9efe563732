"""The precision that `auto` stands for: by what the device can do, decided once per run, and kept by its folder."""

import platform
from pathlib import Path

import pytest
import torch
import yaml
from tiny_command import read, results, start, stopping_at

from atp import run as runs
from atp.ground.errors import InputError
from atp.inputs import precision
from atp.inputs.precision import autocast_dtype, of_device, precision_at, slow_precision
from atp.inputs.resolve import resolve
from atp.plan import make_plan
from atp.training.resume import begun
from atp.training.trainer import ATPTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("wide_budget")]


@pytest.fixture
def processor(monkeypatch):
    """Sets what the processor can do from now on."""

    def having(*features):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True), raising=False)

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    return having


@pytest.fixture(scope="module")
def undecided(config):
    """The tiny config with `precision: auto`, without the dense model."""
    values = config.model_dump(mode="json")
    values["training"]["precision"] = "auto"
    values["evaluation"] |= {"dense_baseline": False, "windows": 4, "questions": 2}
    return type(config).parse(values)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ((), "float32"),
        (("avx2", "avx512_f", "avx512_vnni"), "float32"),
        (("avx512_f", "avx512_bf16"), "bfloat16"),
        (("amx_tile", "amx_bf16"), "bfloat16"),
        (("neon", "sve"), "float32"),
        (("neon", "bf16"), "bfloat16"),
        (("sve", "sve_bf16"), "bfloat16"),
    ],
)
def test_a_processor_with_instructions_for_bfloat16_takes_it(processor, features, expected):
    processor(*features)
    assert of_device("cpu") == expected


def test_a_torch_without_onednn_does_not_use_them(processor, monkeypatch):
    processor("avx512_bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert of_device("cpu") == of_device("mps") == "float32"


@pytest.mark.skipif(platform.system() != "Linux", reason="reads what Linux says of the processor")
def test_an_older_torch_is_no_obstacle(monkeypatch):
    expected = of_device("cpu")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert of_device("cpu") == expected
    assert precision._cpu_features(), "Linux names some"


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_emulates_bfloat16_does_not_take_it(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert of_device("cuda") == ("bfloat16" if native else "float32")


def test_nobody_can_ask_for_a_dtype_before_it_is_decided():
    assert autocast_dtype("float32") is None and autocast_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(KeyError):
        autocast_dtype("auto")


STOPS = {
    "before the first score": (runs.Run, "_score_once"),
    "before the first step": (ATPTrainer, "train"),
    "in training": (ATPTrainer, "_freeze"),
    "in the export": (ATPTrainer, "export"),
    "before the final score": (runs.Run, "_conclude"),
}


@pytest.fixture(scope="module")
def unbroken(undecided, tmp_path_factory):
    """Folders of runs that nothing broke off, on processors with and without bfloat16."""
    folders = {}
    for name, features in (("bfloat16", {"avx512_bf16": True}), ("float32", {})):
        folders[name] = tmp_path_factory.mktemp(name) / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("atp.inputs.promises.BUDGET_TOLERANCE", 0.02)
            patch.setattr(torch.cpu, "get_capabilities", lambda features=features: features, raising=False)
            patch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
            start(undecided, folders[name])
    assert results(folders["bfloat16"]) != results(folders["float32"])
    return folders


def scores(folder):
    """Perplexity and answers of the models that a run scored."""
    found = read(folder, "evaluation.json")
    return {name: (found[name]["perplexity"], found[name]["tasks"]) for name in ("original", "final")}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("other", [(), ("avx512_bf16",)], ids=["without", "with"])
def test_a_run_goes_on_in_the_precision_it_was_started_in(undecided, unbroken, tmp_path, processor, stop, other):
    folder, said = tmp_path / "out", []
    processor(*() if other else ("avx512_bf16",))
    with stopping_at(*STOPS[stop]):
        start(undecided, folder)
    before = "float32" if other else "bfloat16"
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("config.yaml", "resolved.yaml")]
    assert [yaml.safe_load(text)["training"]["precision"] for text in texts] == ["auto", before]
    processor(*other)
    start(undecided, folder, resume=True, say=said.append)
    assert results(folder) == results(unbroken[before])
    assert scores(folder) == scores(unbroken[before])
    assert any("this device has no instructions" in line for line in said) == (before == "bfloat16")


def test_a_damaged_config_leaves_the_answer_to_the_checkpoint(undecided, unbroken, tmp_path, processor):
    folder = tmp_path / "out"
    processor("avx512_bf16")
    with stopping_at(ATPTrainer, "export"):
        start(undecided, folder)
    for name in ("config.yaml", "resolved.yaml"):
        (folder / name).write_text("{", encoding="utf-8")
    processor()
    start(undecided, folder, resume=True)
    assert results(folder) == results(unbroken["bfloat16"])


def test_another_precision_than_the_run_s_is_refused(undecided, tmp_path, processor):
    folder = tmp_path / "out"
    processor("avx512_bf16")
    with stopping_at(ATPTrainer, "train"):
        start(undecided, folder)
    for _ in range(2):
        with pytest.raises(InputError, match="changed config .training.precision: 'auto' -> 'float32'"):
            start(undecided, folder, resume=True, training={"precision": "float32"})
        (folder / "resolved.yaml").write_text("{", encoding="utf-8")


def test_plan_and_scores_of_a_run_take_its_precision(undecided, unbroken, processor):
    for name, folder in unbroken.items():
        processor(*() if name == "bfloat16" else ("avx512_bf16",))
        kept = undecided.export.model_copy(update={"keep_adapter": True})
        config = undecided.model_copy(update={"output_dir": str(folder), "export": kept})
        assert begun(config).training.precision == name
        assert make_plan(config)["model"]["products"] == name
        places = [str(folder), str(folder / "model"), str(folder / "config.yaml")]
        assert [precision_at("auto", place) for place in places] == [name] * 3
        assert precision_at("auto", str(folder.parent)) == ("float32" if name == "bfloat16" else "bfloat16")
        assert precision_at("float32", *places) == "float32"


def test_a_gpu_that_is_not_here_is_planned_with_bfloat16(undecided, processor, tmp_path):
    processor()
    config = undecided.model_copy(update={"output_dir": str(tmp_path / "none")})
    assert make_plan(config)["model"]["products"] == "float32"
    assert make_plan(config, device="cuda")["model"]["products"] == "bfloat16"


def test_a_trainer_from_python_decides_once(undecided, tmp_path, processor):
    processor("avx512_bf16")
    values = undecided.model_dump(mode="json") | {"output_dir": str(tmp_path / "out")}
    trainer = ATPTrainer.from_config(type(undecided).parse(values))
    processor()
    assert trainer.autocast_dtype is trainer.pruning.autocast is torch.bfloat16
    assert trainer.checkpoint().meta["config"]["training"]["precision"] == "bfloat16"
    assert slow_precision(trainer.config) and not slow_precision(resolve(undecided))
    assert not Path(trainer.config.output_dir).exists()
