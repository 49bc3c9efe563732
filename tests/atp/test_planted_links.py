"""Links under every name that a command writes lead outside, and nothing is ever written there."""

import os
import shutil

import pytest
from tiny_command import results, start, stopping_at

from atp.ground.errors import InputError
from atp.report import write_report
from atp.run import Run
from atp.studies.compare import Comparison
from atp.studies.engines import Here
from atp.studies.experiments import Experiment
from atp.studies.sweep import Sweep
from atp.studies.sweep.units import UNITS
from atp.training.trainer import ATPTrainer

pytestmark = pytest.mark.usefixtures("wide_budget")


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


class Planted:
    """A link in place of each name in a folder, and of the temporary names that can be guessed from it.

    Each leads to a file of its own outside, with the content that lay under the name, so that the command goes on; that
    of a lock means nothing to it.
    """

    def __init__(self, folder, names, outside):
        outside.mkdir()
        self.canaries, self.links = {}, []
        for path in map(folder.joinpath, names):
            guesses = (f".writing-{path.name}", f".writing-old-{path.name}")
            for place in (path, *map(path.with_name, guesses)):
                canary = outside / str(len(self.links))
                canary.write_bytes(place.read_bytes() if place.is_file() and place.name != ".lock" else b"precious")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.unlink(missing_ok=True)
                place.symlink_to(canary)
                self.canaries[canary] = canary.read_bytes()
                self.links.append(place)

    def met_by(self, command):
        """Runs a command until it ends well, without each link that it refuses; returns what these are called."""
        refused = set()
        for _ in self.links:
            try:
                command()
            except InputError as error:
                told = next(link for link in self.links if str(error).startswith(f"{link} is a link or no file"))
                told.unlink()
                refused.add(told.name)
            else:
                break
        assert {path: path.read_bytes() for path in self.canaries} == self.canaries
        return refused

    def left(self):
        return [link.name for link in self.links if link.is_symlink()]


@pytest.fixture
def small(config):
    values = config.model_dump(mode="json")
    values["evaluation"] |= {"dense_baseline": False, "windows": 4, "questions": 2}
    return type(config).parse(values)


def train(config, folder, *, resume):
    values = config.model_dump(mode="json") | {"output_dir": str(folder), "export": {"keep_adapter": True}}
    values["training"]["metrics_file"] = str(folder / "state.prom")
    Run(type(config).parse(values), resume=resume, command="atp", say=lambda line: None).execute()


def test_a_run_that_is_taken_up_again(small, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(small, whole, resume=False)
    with stopping_at(ATPTrainer, "_cut"):
        train(small, out, resume=False)
    names = [name for name in files_in(whole) if not name.startswith("checkpoints/")]
    planted = Planted(out, {*names, *files_in(out)}, tmp_path / "outside")
    assert planted.met_by(lambda: train(small, out, resume=True)) == {".lock"}
    assert results(out) == results(whole)
    assert sorted(planted.left()) == ["config.yaml", "resolved.yaml"] and not list(out.rglob(".writing-*"))


def test_the_folder_of_a_run_that_has_not_begun(small, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    names = [".lock", ".launch", "inputs.json", "latency.json", "length.json", "resolved.yaml"]
    planted = Planted(out, names, tmp_path / "outside")
    assert planted.met_by(lambda: start(small, out)) == {".lock"}
    assert (out / "report.html").is_file()


def compare(config, folder, *, resume):
    Comparison(config, ["static"], [0], folder, resume=resume, command="atp").execute()


def sweep(config, folder, *, resume):
    targets = [target for unit in UNITS if unit.option == "keep" for target in unit.parse("0.8,0.6")]
    Sweep(config, targets, folder, resume=resume, command="atp", engine=Here(lambda line: None)).execute()


def experiment(config, folder, *, resume):
    (folder.parent / "base.yaml").write_text(config.dump())
    (folder.parent / "which.yaml").write_text("question: Which?\ndomains: [custom]\narms: [{method: atp}]\n")
    spec = str(folder.parent / "which.yaml")
    Experiment(spec, [], runs=folder / "runs", out=folder / "out", command="atp").execute()


@pytest.mark.parametrize(
    ("command", "records"),
    [
        (compare, {"comparison.json", "comparison.md", "comparison.html"}),
        (sweep, {"sweep.csv", "sweep.json", "sweep.png"}),
        (experiment, {"which.csv", "which.json"}),
    ],
)
def test_what_a_command_of_several_runs_writes_again(small, tmp_path, command, records):
    folder = tmp_path / "folder"
    command(small, folder, resume=False)
    planted = Planted(folder, files_in(folder), tmp_path / "outside")
    assert planted.met_by(lambda: command(small, folder, resume=True)) == {".lock"}
    assert records <= {*map(os.path.basename, files_in(folder))} and not records & {*planted.left()}


def test_a_report_is_written_anew(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    planted = Planted(out, files_in(out), tmp_path / "outside")
    assert planted.met_by(lambda: write_report(out)) == set()
    assert "report.html" not in planted.left()
