"""Examples and experiments are found away from the clone."""

import pytest

from atp.config import ATPConfig, shipped
from atp.ground.errors import InputError
from atp.studies.experiments.spec import ExperimentSpec


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The files that come with the package lie in neither the tree nor the working directory."""
    root = tmp_path / "package"
    for name in ("examples/one.yaml", "experiments/two.yaml", "experiments/base.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "examples" / "one.yaml").write_text("{model: {path: m}, output_dir: runs/one}")
    (root / "experiments" / "two.yaml").write_text("{question: why, domains: [a], arms: [{method: atp}]}")
    (root / "experiments" / "base.yaml").write_text("{model: {path: m}, seed: 7}")
    monkeypatch.setattr(shipped, "_ROOT", root)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return root


def test_an_example_is_found_by_its_path_in_the_clone_and_the_working_directory_comes_first(package, tmp_path):
    assert ATPConfig.load("examples/one.yaml").output_dir == "runs/one"
    assert ATPConfig.load("./examples/one.yaml").output_dir == "runs/one"
    with pytest.raises(InputError, match="^config file one.yaml does not exist"):
        ATPConfig.load("one.yaml")
    own = tmp_path / "work" / "experiments"
    own.mkdir()
    (own / "two.yaml").write_text("{question: my own, domains: [a], arms: [{method: atp}]}")
    spec, path = ExperimentSpec.load("two")
    assert spec.question == "my own"
    assert spec.config(path, "health-mini", []).seed == 7, "the base comes with the package"
    with pytest.raises(InputError, match=r"\(here: two\)"):
        ExperimentSpec.load("three")


@pytest.mark.parametrize("name", ["two", "experiments/two.yaml"])
def test_an_experiment_and_its_base_are_found(package, name):
    spec, path = ExperimentSpec.load(name)
    assert spec.question == "why" and path == package / "experiments" / "two.yaml"
    assert spec.config(path, "health-mini", []).seed == 7
