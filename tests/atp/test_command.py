"""The command itself: its version, its help, and what it says before a run."""

import os
import subprocess
import sys

import pytest

import atp_kernels
from atp import cli
from atp.environment import slow_kernels
from atp_kernels._version import __version__

COMMANDS = ("train", "demo", "eval", "compare", "experiment", "report", "env")
AUTO = "from transformers import AutoConfig, AutoModelForCausalLM"


def call(monkeypatch, capsys, *words):
    """(exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["atp", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code, *capsys.readouterr()


def test_version(monkeypatch, capsys):
    assert call(monkeypatch, capsys, "--version") == (0, f"atp {__version__}\n", "")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["atp", *COMMANDS])
def test_short_help_is_the_long_one(monkeypatch, capsys, command):
    short, long = (call(monkeypatch, capsys, *command, option) for option in ("-h", "--help"))
    assert short == long and short[0] == 0 and "Usage: " in short[1]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["export", "--help"]], ids=" ".join)
def test_help_waits_for_no_library_that_takes_seconds(words):
    code = (
        f"import sys; sys.argv = ['atp', *{words}]\nfrom atp.cli import main\ntry: main()\n"
        "finally: print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("Usage: atp")
    assert done.stdout.endswith("[]\n")


def test_importing_the_package_loads_no_library():
    """Nothing that Python does not bring: by the set of modules, which no slow machine changes."""
    code = (
        "import sys; before = set(sys.modules)\nimport atp\nnew = {name.partition('.')[0] for name in sys.modules}"
        "\nprint(sorted(new - before - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['atp']\n", done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        f"{AUTO}; import atp",
        # These import the Auto classes while they are themselves half imported.
        f"import atp, transformers.models.llama.modeling_llama; {AUTO}",
        f"import atp; atp.ATPConfig; {AUTO}",
    ],
)
def test_a_program_that_imports_the_package_can_load_a_cut_model(imports):
    code = (
        f"{imports}\nsizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)\n"
        "config = AutoConfig.for_model('atp_llama', vocab_size=8, **sizes)\n"
        "print(type(AutoModelForCausalLM.from_config(config)).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "atp.models.llama\n", done.stderr


def test_a_shell_completes_commands():
    asked = {"_ATP_COMPLETE": "complete_bash", "COMP_WORDS": "atp tr", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "atp"], capture_output=True, text=True, env={**os.environ, **asked})
    assert (done.returncode, done.stdout, done.stderr) == (0, "train\n", "")


def test_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "atp", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"atp {__version__}\n"), done.stderr


@pytest.fixture
def without_extension(monkeypatch):
    reasons = {"native": "the extension is on holiday"}
    monkeypatch.setattr(atp_kernels, "available_backends", lambda: reasons)
    return reasons


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_run_says_first_that_kernels_are_missing(monkeypatch, capsys, without_extension, command):
    code, shown, _ = call(monkeypatch, capsys, command, "no.yaml")
    assert code == 2 and "the extension is on holiday" in shown and "ATP_BUILD=0" in shown


def test_who_wants_no_extension_hears_nothing(monkeypatch, without_extension):
    assert slow_kernels()
    monkeypatch.setenv("ATP_BUILD", "0")
    assert slow_kernels() is None
    monkeypatch.delenv("ATP_BUILD")
    without_extension["native"] = "the extension was not built, since ATP_BUILD=0 says so"
    assert slow_kernels() is None
    without_extension["native"] = None
    assert slow_kernels() is None
