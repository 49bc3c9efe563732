"""The notebook runs from its first cell to its last, and is committed as it ran."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "talks.ipynb"


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_committed_executed_and_without_errors(committed):
    assert [cell.execution_count for cell in code(committed)] == list(range(1, len(code(committed)) + 1))
    assert all(output.output_type != "error" for cell in code(committed) for output in cell.outputs)


@pytest.mark.slow
def test_it_runs_and_ends_with_a_smaller_model_that_answers(committed, tmp_path):
    NotebookClient(committed, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    streams = [[o for o in cell.outputs if o.output_type == "stream"] for cell in code(committed)]
    said = ["".join(stream.text for stream in cell if stream.name == "stdout") for cell in streams]
    assert "(6" in said[-2] or "(5" in said[-2], said[-2]
    assert said[-1].splitlines()[-1].endswith("tokens")
    assert (tmp_path / "runs" / "talks" / "model" / "model.safetensors").is_file()
