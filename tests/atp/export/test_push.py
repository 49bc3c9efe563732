"""`atp push`: what would be uploaded, and what is, by a stand-in for the Hub."""

import errno

import pytest
from tiny_folder import save
from typer.testing import CliRunner

from atp.cli import cli
from atp.export import push as pushing
from atp.ground.ending import ending
from atp.ground.errors import InputError


class Hub:
    """Records what it is asked, with the signature of huggingface_hub.HfApi's methods."""

    def __init__(self, token):
        self.token, Hub.last = token, self
        self.calls = []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append((repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append((repo_id, folder_path))
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    folder = save(tmp_path / "run" / "model")
    (folder / "README.md").write_text("# A model\n", encoding="utf-8")
    monkeypatch.setattr(pushing, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(Hub, "last", None, raising=False)
    return tmp_path / "run"


def test_without_yes_nothing_leaves_the_machine(run):
    done = CliRunner().invoke(cli.app, ["push", str(run), "me/small"])
    assert done.exit_code == 0 and Hub.last is None
    assert "model.safetensors" in done.output and "config.json" in done.output and "--yes" in done.output


@pytest.mark.parametrize("public", [False, True])
def test_the_model_of_a_run_is_uploaded_with_the_token_of_the_environment(run, public):
    done = CliRunner().invoke(cli.app, ["push", str(run), "me/small", "--yes", *(["--public"] if public else [])])
    assert done.exit_code == 0 and "https://huggingface.co/me/small" in done.output
    assert Hub.last.token == "hf_test" and "hf_test" not in done.output
    assert Hub.last.calls == [("me/small", not public, True), ("me/small", run / "model")]


def test_a_half_model_a_bad_name_and_no_token_are_refused(run, monkeypatch):
    for name in ("small", "a/b/c", "a b/c", ""):
        with pytest.raises(InputError, match="OWNER/NAME"):
            pushing.push(run, name)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="HF_TOKEN is not set"):
        pushing.push(run, "me/small")
    (run / "model" / "README.md").unlink()
    with pytest.raises(InputError, match="lacks README.md"):
        pushing.push(run, "me/small")
    (run / "model" / "README.md").write_text("#")
    (run / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights in safetensors"):
        pushing.push(run, "me/small")
    assert Hub.last is None


def test_what_the_hub_refuses_is_one_sentence(run, monkeypatch):
    def refuse(self, *arguments, **options):
        raise OSError("no route to the Hub")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(InputError, match="did not take me/small .*no route"):
        pushing.push(run, "me/small")


def test_a_full_disk_here_is_not_blamed_on_the_hub(run, monkeypatch):
    def full(self, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "/home/me/.cache/staged")

    monkeypatch.setattr(Hub, "create_repo", full)
    with pytest.raises(OSError) as caught:
        pushing.push(run, "me/small")
    said = ending(caught.value)[0]
    assert said.startswith("the disk is full") and ".cache/staged" in said and "free some space" in said


def test_a_run_without_a_model_says_where_it_stands(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0", encoding="utf-8")
    with pytest.raises(
        InputError, match="has no model yet: it stopped before its first step: continue it with atp train"
    ):
        pushing.model_files(tmp_path)
