"""What whole runs, comparisons and experiments are tested on."""

import pytest
from tiny_inputs import tiny_config


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A tiny model and labelled questions whose answer is in the text."""
    return tiny_config(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def wide_budget(monkeypatch):
    """One channel of the tiny model is more than the tolerance on the budget."""
    monkeypatch.setattr("atp.run.BUDGET_TOLERANCE", 0.02)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder of a run that was never broken off."""
    from tiny_command import start

    folder = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atp.run.BUDGET_TOLERANCE", 0.02)
        start(config, folder)
    return folder
