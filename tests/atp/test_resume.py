"""A run that is taken up again ends as if it had never stopped, and only where it may be taken up."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_command import everything, one_in_four, read, results, start, stopping_at
from tiny_folder import edited, moved_weights

from atp import run as runs
from atp.export import hf
from atp.ground.errors import InputError
from atp.run import Run
from atp.training import trainer as trainers
from atp.training.resume import of_model_folder
from atp.training.trainer import ATPTrainer

OUT = Path("out")


@pytest.fixture(scope="module")
def light(config):
    """The config with few scores; its paths are relative, so that a folder can be copied with what began in it."""
    values = config.model_dump(mode="json")
    values["model"]["path"], values["data"]["train"] = "inputs", "inputs/data.jsonl"
    values["evaluation"] |= {"dense_baseline": False, "windows": 4, "questions": 2}
    return type(config).parse(values)


def desk(config, folder):
    shutil.copytree(config.model.path, folder / "inputs")
    return folder


@pytest.fixture(scope="module")
def begun(config, light, tmp_path_factory):
    """Folders with inputs and a run in `out`: one that has ended, and one that was stopped before its export."""
    folders = {name: desk(config, tmp_path_factory.mktemp(name)) for name in ("ended", "stopped")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders["ended"])
        start(light, OUT)
        patch.chdir(folders["stopped"])
        with stopping_at(ATPTrainer, "export"):
            start(light, OUT)
    return folders


@pytest.fixture
def here(begun, config, tmp_path, monkeypatch):
    def work(name=None):
        shutil.copytree(begun[name], tmp_path / "here") if name else desk(config, tmp_path / "here")
        monkeypatch.chdir(tmp_path / "here")

    return work


@pytest.fixture
def whole(begun):
    return begun["ended"] / "out"


def test_a_finished_run_is_left_as_it_is_and_says_so(light, here):
    here("ended")
    before, said = everything(OUT), []
    summary = start(light, OUT, resume=True, say=said.append)
    assert everything(OUT) == before
    assert said == ["out is finished and left as it is"] and summary == read(OUT, "summary.json")
    adapter = load_file(OUT / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def half(name):
    return hf, "write_text", {"after": True, "when": lambda path, _: path.parent.name.endswith(f"-{name}")}


STOPS = {
    "before the export": (ATPTrainer, "export", {}),
    "in the base": half("base"),
    "before the model": (hf, "as_stored", {}),
    "after the model": (hf, "certify_export", {}),
    "in the adapter": half("adapter"),
    "before the base": (hf, "as_stored", {"when": lambda _, merged=True: not merged}),
    "before the certificate": (trainers, "write_certificate", {}),
    "after the certificate": (trainers, "write_certificate", {"after": True}),
    "in the model": half("model"),
    "before the final score": (Run, "_conclude", {}),
    "in the final score": (runs, "sample_answers", {"when": lambda model, *_, **__: "ATP" in type(model).__name__}),
    "before the speed": (Run, "_time", {}),
    "in the speed": (runs, "throughputs", {"after": True}),
    "before the report": (runs, "write_report", {}),
    "in the report": (runs, "write_report", {"after": True}),
}


@pytest.mark.parametrize("stop", one_in_four(STOPS))
def test_any_stop_after_training_resumes_to_the_same_bytes(light, here, whole, stop):
    where, name, options = STOPS[stop]
    here("stopped")
    with stopping_at(where, name, **options):
        start(light, OUT, resume=True)
    if options.get("when") and where is hf:
        assert not (OUT / stop.rpartition(" ")[2]).exists(), "there is never half a folder under its name"
    start(light, OUT, resume=True)
    assert results(OUT.absolute()) == results(whole)
    ours, theirs = (read(path, "evaluation.json")["final"] for path in (OUT, whole))
    assert ours["perplexity"] == theirs["perplexity"] and ours["model_sha256"] == theirs["model_sha256"]
    assert (OUT / "report.html").is_file() and (OUT / "certificate.json").is_file()
    assert not list(OUT.rglob(".writing-*"))


def test_a_score_of_another_model_is_made_anew(light, here, whole):
    here("ended")
    scores = read(OUT, "evaluation.json")
    moved_weights(OUT / "model")
    other = scores["final"] | {"perplexity": 1.0, "model_sha256": of_model_folder(OUT / "model")}
    (OUT / "evaluation.json").write_text(json.dumps(scores | {"final": other}))
    start(light, OUT, resume=True)
    assert results(OUT.absolute()) == results(whole)
    assert read(OUT, "evaluation.json")["final"]["perplexity"] == scores["final"]["perplexity"]
    assert read(OUT, "summary.json")["perplexity"]["final"] == scores["final"]["perplexity"]


# Where a run may not be resumed


def test_a_folder_of_anything_else_is_not_resumed(config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for content, message in (
        (None, "^nothing to resume in .*: it has no readable config.yaml and no checkpoints"),
        ("theme: dark\n", "not the folder of a run"),
    ):
        if content:
            (out / "config.yaml").write_text(content)
        with pytest.raises(InputError, match=message):
            start(config, out, resume=True)
    assert {path.name for path in out.iterdir()} == {"thesis.txt", "config.yaml"}


@pytest.mark.parametrize("place", ["model", "", "base", "adapter", "link", "data"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_does_not_write_over_its_own_inputs(light, here, place, resume):
    here()
    changed = light.model_dump(mode="json") | {"output_dir": "out"}
    if place == "link":
        OUT.mkdir()
        (OUT / "model").symlink_to("../inputs")
    elif place == "data":
        OUT.mkdir()
        shutil.move("inputs/data.jsonl", OUT / "data.jsonl")
        changed["data"]["train"] = "out/data.jsonl"
    else:
        shutil.copytree("inputs", OUT / place)
        changed["model"]["path"] = str(OUT / place)
    asked = type(light).parse(changed)
    if resume:
        (OUT / "config.yaml").write_text(asked.dump())
    before = everything(Path())
    with pytest.raises(InputError, match="which the run writes to" if resume else "which the run writes to|not empty"):
        start(asked, OUT, resume=resume)
    assert everything(Path()) == before


CHANGES = {
    "base weights": moved_weights,
    "model config": edited("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
    "tokenizer": edited("tokenizer.json", '"heart": 3', '"heart": 4'),
    "train data": edited("data.jsonl", "heart", "blood"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_changed_inputs_are_refused_by_name(light, here, what, checkpoint):
    here("stopped")
    if not checkpoint:  # as if stopped before its first
        shutil.rmtree(OUT / "checkpoints")
    CHANGES[what](Path("inputs"))
    before = everything(OUT)
    with pytest.raises(InputError, match=rf"^cannot resume: .*{what}.* not what the run was started with: put back"):
        start(light, OUT, resume=True)
    assert everything(OUT) == before


@pytest.mark.parametrize("name", ["inputs.json", "config.yaml"])
def test_the_checkpoint_knows_what_the_folder_has_lost(light, here, name):
    here("stopped")
    (OUT / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"lora\.r: 16 -> 4"):
        start(light, OUT, resume=True, lora={"r": 4})
    moved_weights(Path("inputs"))
    with pytest.raises(InputError, match="base weights"):
        start(light, OUT, resume=True)


# Damage in the run folder


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_torn_records_are_named_and_made_anew(light, here, whole):
    here("stopped")
    with (OUT / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "pha')
    (OUT / "evaluation.json").write_text('{"original": {"perpl')
    (OUT / ".writing-report.html").write_text("half")
    (OUT / "checkpoints" / ".writing-checkpoint-00000009").mkdir()
    (OUT / "checkpoints" / "checkpoint-00000006" / "state.json").write_text("{}")
    said = []
    start(light, OUT, resume=True, say=said.append)
    for sentence in ("1 damaged line", "evaluation.json is damaged", "checkpoint-00000006, state.json is not what was"):
        assert any(sentence in line for line in said), sentence
    assert results(OUT.absolute()) == results(whole) and steps(OUT) == list(range(1, 7))
    ours, theirs = (read(folder, "evaluation.json")["original"]["perplexity"] for folder in (OUT, whole))
    assert ours == theirs and not list(OUT.rglob(".writing-*"))


def test_records_never_double(light, here):
    """Killed before the first checkpoint, the steps that are run again leave one line each."""
    here()
    late = {"training": {"save_every": 50}}
    with stopping_at(ATPTrainer, "_cut"):
        start(light, OUT, **late)
    start(light, OUT, resume=True, **late)
    assert steps(OUT) == list(range(1, 7))


def test_damaged_checkpoints_alone_stop_the_run_before_anything_is_scored(light, here):
    here("stopped")
    for path in (OUT / "checkpoints").rglob("state.json"):
        path.write_text("[]")
    before = everything(OUT)
    with pytest.raises(InputError, match=r"no checkpoint in .* is intact"):
        start(light, OUT, resume=True)
    assert everything(OUT) == before
