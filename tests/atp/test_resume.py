"""A run that is taken up again ends as if it had never stopped, and only where it may be taken up."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny_command import everything, one_in_four, read, results, start, stopping_at

from atp import run as runs
from atp.export import hf
from atp.ground.errors import InputError
from atp.run import Run
from atp.training import trainer as trainers
from atp.training.resume import of_model_folder
from atp.training.trainer import ATPTrainer

pytestmark = pytest.mark.usefixtures("wide_budget")


@pytest.fixture
def inputs(config, tmp_path):
    """The config on a copy of model and data, to be changed."""
    folder = shutil.copytree(config.model.path, tmp_path / "inputs")
    values = config.model_dump(mode="json")
    values["model"]["path"] = str(folder)
    values["data"]["train"] = str(folder / "data.jsonl")
    values["evaluation"] |= {"dense_baseline": False, "windows": 4, "questions": 2}
    return type(config).parse(values), folder


def test_a_finished_run_is_left_as_it_is_and_says_so(config, finished):
    before, said = everything(finished), []
    summary = start(config, finished, resume=True, say=said.append)
    assert everything(finished) == before
    assert said == [f"{finished} is finished and left as it is"]
    assert summary == read(finished, "summary.json")
    adapter = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


STOPS = {
    "before the export": (ATPTrainer, "export", {}),
    "before the model": (hf, "merge_adapter", {}),
    "after the model": (hf, "certify_export", {}),
    "before the base": (hf, "base_of", {}),
    "in the adapter": (hf, "adapter_card", {}),
    "before the certificate": (trainers, "write_certificate", {}),
    "after the certificate": (trainers, "write_certificate", {"after": True}),
    "before the final score": (Run, "_conclude", {}),
    "in the final score": (runs, "sample_answers", {"when": lambda model, *_, **__: "ATP" in type(model).__name__}),
    "before the speed": (Run, "_time", {}),
    "in the speed": (runs, "throughputs", {"after": True}),
    "before the report": (runs, "write_report", {}),
    "in the report": (runs, "write_report", {"after": True}),
}


@pytest.mark.parametrize("stop", one_in_four(STOPS))
def test_any_stop_after_training_resumes_to_the_same_bytes(config, finished, tmp_path, stop):
    where, name, options = STOPS[stop]
    folder = tmp_path / "out"
    with stopping_at(where, name, **options):
        start(config, folder)
    start(config, folder, resume=True)
    assert results(folder) == results(finished)
    ours, theirs = (read(path, "evaluation.json")["final"] for path in (folder, finished))
    assert ours["perplexity"] == theirs["perplexity"] and ours["model_sha256"] == theirs["model_sha256"]
    assert (folder / "report.html").is_file() and (folder / "certificate.json").is_file()


@pytest.mark.parametrize("name", ["base", "adapter", "model"])
def test_there_is_never_half_a_folder_under_its_name(config, tmp_path, name):
    """Stopped while files are being written, and again on resume, where there is an older one to replace."""
    folder = tmp_path / "out"
    with stopping_at(hf, "write_text", after=True, when=lambda path, _: path.parent.name.endswith(f"-{name}")):
        start(config, folder)
    assert not (folder / name).exists()
    start(config, folder, resume=True)
    (folder / "report.html").unlink()
    assert not list(folder.rglob(".writing-*"))


def test_a_score_of_another_model_is_made_anew(inputs, tmp_path):
    config, _ = inputs
    out = tmp_path / "out"
    start(config, out)
    expected, scores = results(out), read(out, "evaluation.json")
    weights(out / "model")
    other = scores["final"] | {"perplexity": 1.0, "model_sha256": of_model_folder(out / "model")}
    (out / "evaluation.json").write_text(json.dumps(scores | {"final": other}))
    start(config, out, resume=True)
    assert results(out) == expected
    assert read(out, "evaluation.json")["final"]["perplexity"] == scores["final"]["perplexity"]
    assert read(out, "summary.json")["perplexity"]["final"] == scores["final"]["perplexity"]


# Where a run may not be resumed


def test_a_folder_of_anything_else_is_not_resumed(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(
        InputError, match=r"^nothing to resume in .*: it has no readable config.yaml and no checkpoints"
    ):
        start(config, tmp_path / "out", resume=True)
    (tmp_path / "out" / "config.yaml").write_text("theme: dark\n")
    with pytest.raises(InputError, match="not the folder of a run"):
        start(config, tmp_path / "out", resume=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"thesis.txt", "config.yaml"}


@pytest.mark.parametrize("place", ["model", "", "base", "adapter", "link", "data"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_does_not_write_over_its_own_inputs(inputs, tmp_path, place, resume):
    config, folder = inputs
    out = tmp_path / "out"
    overrides = {"model": {"path": str(out / place)}}
    if place == "link":
        out.mkdir()
        (out / "model").symlink_to(folder)
        overrides = {}
    elif place == "data":
        out.mkdir()
        shutil.move(folder / "data.jsonl", out / "data.jsonl")
        overrides = {"data": {"train": str(out / "data.jsonl")}}
    else:
        shutil.copytree(folder, out / place)
    if resume:
        values = config.model_dump(mode="json") | {"output_dir": str(out)}
        for section, keys in overrides.items():
            values[section] |= keys
        (out / "config.yaml").write_text(type(config).parse(values).dump())
    before = everything(tmp_path)
    expected = r"which the run writes to" if resume else r"which the run writes to|is not empty"
    with pytest.raises(InputError, match=expected):
        start(config, out, resume=resume, **overrides)
    assert everything(tmp_path) == before


def weights(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[3] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def edited(name, old, new):
    def change(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


CHANGES = {
    "base weights": weights,
    "model config": edited("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
    "tokenizer": edited("tokenizer.json", '"heart": 3', '"heart": 4'),
    "train data": edited("data.jsonl", "heart", "blood"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("stop", [(Run, "_train"), (ATPTrainer, "export")], ids=["no checkpoint", "checkpoint"])
def test_changed_inputs_are_refused_by_name(inputs, tmp_path, what, stop):
    config, folder = inputs
    out = tmp_path / "out"
    with stopping_at(*stop):
        start(config, out)
    CHANGES[what](folder)
    before = everything(out)
    with pytest.raises(InputError, match=rf"^cannot resume: .*{what}.* not what the run was started with: put back"):
        start(config, out, resume=True)
    assert everything(out) == before


@pytest.mark.parametrize("name", ["inputs.json", "config.yaml"])
def test_the_checkpoint_knows_what_the_folder_has_lost(inputs, tmp_path, name):
    config, folder = inputs
    out = tmp_path / "out"
    with stopping_at(ATPTrainer, "export"):
        start(config, out)
    (out / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"lora\.r: 16 -> 4"):
        start(config, out, resume=True, lora={"r": 4})
    weights(folder)
    with pytest.raises(InputError, match="base weights"):
        start(config, out, resume=True)


# Damage in the run folder


def test_torn_records_are_named_and_made_anew(inputs, tmp_path):
    config, _ = inputs
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    start(config, whole)
    with stopping_at(ATPTrainer, "export"):
        start(config, torn)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "pha')
    (torn / "evaluation.json").write_text('{"original": {"perpl')
    (torn / ".writing-report.html").write_text("half")
    (torn / "checkpoints" / ".writing-checkpoint-00000009").mkdir()
    said = []
    start(config, torn, resume=True, say=said.append)
    assert any("metrics.jsonl" in line and "1 damaged line" in line for line in said)
    assert any("evaluation.json is damaged" in line for line in said)
    assert results(torn) == results(whole)
    steps = [json.loads(line)["step"] for line in (torn / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))
    assert (
        read(torn, "evaluation.json")["original"]["perplexity"]
        == read(whole, "evaluation.json")["original"]["perplexity"]
    )
    assert not list(torn.rglob(".writing-*"))


def test_records_never_double(inputs, tmp_path):
    """Killed before the first checkpoint, the steps that are run again leave one line each."""
    config, _ = inputs
    out = tmp_path / "out"
    late = {"training": {"save_every": 50}}
    with stopping_at(ATPTrainer, "_cut"):
        start(config, out, **late)
    said = []
    start(config, out, resume=True, say=said.append, **late)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


def test_damaged_checkpoints_alone_stop_the_run_before_anything_is_scored(inputs, tmp_path):
    config, _ = inputs
    out = tmp_path / "out"
    with stopping_at(ATPTrainer, "export"):
        start(config, out)
    for path in (out / "checkpoints").rglob("state.json"):
        path.write_text("[]")
    before = everything(out)
    with pytest.raises(InputError, match=r"no checkpoint in .* is intact"):
        start(config, out, resume=True)
    assert everything(out) == before


def test_a_damaged_newest_checkpoint_is_named_on_screen(inputs, tmp_path):
    config, _ = inputs
    whole, out = tmp_path / "whole", tmp_path / "out"
    start(config, whole)
    with stopping_at(ATPTrainer, "export"):
        start(config, out)
    (out / "checkpoints" / "checkpoint-00000006" / "state.json").write_text("{}")
    said = []
    start(config, out, resume=True, say=said.append)
    assert any("checkpoint-00000006, state.json is not what was written" in line for line in said)
    assert results(out) == results(whole)
