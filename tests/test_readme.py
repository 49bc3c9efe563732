"""What README and notebook show runs, figures are those of the CSV files, links lead somewhere, examples parse."""

import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch
import typer
import yaml
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM

from atp.cli.cli import app
from atp.config import ATPConfig
from atp.evaluation import throughputs
from atp.ground.listing import runs_below

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "atp"))
from tiny_inputs import WORDS, tiny_config  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with `my-model`, `texts.jsonl` and the examples, as the README assumes."""
    (tmp_path / "my-model").mkdir()
    tiny_config(tmp_path / "my-model")
    lines = [f'{{"text": "{number} {" ".join(WORDS[:11] * 4)}"}}' for number in range(80)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_use_of_the_readme(workplace, monkeypatch):
    """The first block is a whole run, and the next one loads what it left; only the number of steps is made small."""
    train, load = BLOCKS[0], BLOCKS[1]
    settings = yaml.safe_load((ROOT / "examples" / "custom.yaml").read_text(encoding="utf-8"))
    settings["model"]["path"], settings["data"]["train"] = "my-model", "texts.jsonl"
    (workplace / "my.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    short = '"output_dir=runs/mine", "training.steps=9", "data.length=32"'
    (workplace / "train.py").write_text(train.replace('"output_dir=runs/mine"', short), encoding="utf-8")
    (workplace / "load.py").write_text(load, encoding="utf-8")
    monkeypatch.setattr("atp.run.throughputs", partial(throughputs, prompt_tokens=16, new_tokens=2, repeats=1))
    certificate = runpy.run_path("train.py")["summary"]["certificate"]
    assert certificate["masked_vs_cut"] < 1e-5 and certificate["removed_lora_norm"] == 0
    (found,) = runs_below(Path("runs"))
    assert found.state == "finished" and Path("runs/mine/report.html").is_file()
    model = runpy.run_path("load.py")["model"]
    original = AutoModelForCausalLM.from_pretrained("my-model")
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in original.parameters())


def test_kernel_example_of_the_readme(tmp_path):
    (tmp_path / "kernels.py").write_text(BLOCKS[2], encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "kernels.py"))
    keep, x = names["keep"], names["x"]
    expected = (x @ names["weight"].T) * keep + (x @ names["lora_a"].T) @ names["lora_b"].T
    torch.testing.assert_close(names["y"], expected)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_example_configs_are_valid(path):
    assert ATPConfig.load(path).output_dir.startswith("runs/")


def check_results(monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--check", "--root", str(folder)])
    runpy.run_path(str(ROOT / "experiments" / "results_page.py"), run_name="__main__")


def test_tables_of_results_are_those_of_the_csv_files(monkeypatch):
    """If this fails: python experiments/results_page.py."""
    check_results(monkeypatch, ROOT)


@pytest.mark.parametrize(("name", "table"), [("README.md", "readme"), ("docs/results.md", "text")])
def test_a_damaged_figure_of_a_table_is_found(monkeypatch, tmp_path, name, table):
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/results.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        (tmp_path / page).write_text(text.replace("24.82", "24.28", 1) if page == name else text, encoding="utf-8")
    with pytest.raises(SystemExit, match=f"^{name}: the table `{table}` differs\n"):
        check_results(monkeypatch, tmp_path)


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text)
    # Where a page says "docs/NAME.md" without a link, that is a promise too.
    links += [(str(ROOT / name), "") for name in re.findall(r"(?<![\w/(])docs/[\w/]+\.md", text)]
    for name, anchor in links:
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {name}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], f"{page.name} links to {name}#{anchor}"


def test_the_readme_is_short_and_its_commands_exist():
    """Subcommands and options; `...` stands for what the line above it says."""
    commands = typer.main.get_command(app).commands
    lines = re.findall(r"^(?:torchrun .* -m )?atp (\w+) (.*)$", README, re.MULTILINE)
    assert len(lines) >= 6
    for name, arguments in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        options = {word for word in shlex.split(arguments, comments=True) if word.startswith("--")}
        assert options <= known, f"atp {name} {arguments}"
    targets = re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)
    assert targets and set(targets) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert len(README.splitlines()) <= 130


NOTEBOOK = ROOT / "examples" / "talks.ipynb"


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
