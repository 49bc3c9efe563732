"""What whole runs, comparisons and experiments are tested on."""

import pytest
from tiny_inputs import tiny_config


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A tiny model and labelled questions whose answer is in the text."""
    return tiny_config(tmp_path_factory.mktemp("inputs"))
