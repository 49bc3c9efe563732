"""The command itself: its version, its help, and what it says before a run."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tiny_folder import save

import atp_kernels
from atp.cli import cli
from atp.cli.console import _Console
from atp.ground.environment import slow_kernels
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
        f"import sys; sys.argv = ['atp', *{words}]\nfrom atp.cli.cli import main\ntry: main()\n"
        "finally: print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("Usage: atp")
    assert done.stdout.endswith("[]\n")


REFUSED = {
    "train": ["no.yaml"],
    "train key": ["config.yaml", "lora.rank=2"],
    "train model": ["config.yaml", "model.path=./nowhere"],
    "train data": ["config.yaml", "data.train=absent.jsonl"],
    "train space": ["config.yaml", "decisions.space=heads"],
    "train output_dir": ["config.yaml", "output_dir=model"],
    "plan": ["config.yaml", "model.path=a/b/c"],
    "compare": ["config.yaml", "--methods", "atp,magnitud"],
    "compare seeds": ["config.yaml", "--seeds", "one"],
    "compare on": ["config.yaml", "--on", "mars"],
    "compare out": ["config.yaml", "--out", "model"],
    "experiment": ["nothing"],
    "experiment seeds": ["stages", "--seeds", "one"],
    "experiment key": ["stages", "lora.rank=2"],
    "sweep": ["config.yaml", "--keep", "2"],
    "sweep twice": ["config.yaml", "--keep", "0.8,0.8"],
    "sweep on": ["config.yaml", "--on", "mars"],
    "sweep out": ["config.yaml", "--out", "model"],
    "eval": ["./nowhere"],
    "eval suite": ["model", "--suite", "absent.jsonl"],
    "eval config": ["model", "--suite", "absent.yaml"],
    "eval output": ["model", "--output", "no/scores.json"],
    "eval precision": ["model", "--precision", "int4"],
    "export": ["model/absent.gguf"],
    "export to": ["model", "--to", "onnx"],
    "export dtype": ["model", "--dtype", "int3"],
    "export out": ["model", "--out", "no/such.gguf"],
    "chat": ["runs/demo/model"],
    "chat against": ["model", "--against", "../nowhere"],
    "push": ["./nowhere", "me/small"],
    "push name": ["model", "small"],
    "report": ["nowhere"],
    "runs": ["nowhere"],
    "init out": ["model", "data.jsonl", "--out", "no/atp.yaml"],
    "demo": ["lora.rank=2"],
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_argument_is_refused_without_the_libraries_that_take_seconds(tmp_path, what):
    """By the set of modules, which no slow machine changes."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "data.jsonl").write_text('{"text": "the cat"}', encoding="utf-8")
    values = {"model": {"path": "model"}, "output_dir": "out", "data": {"train": "data.jsonl"}}
    (tmp_path / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    code = (
        f"import sys; sys.argv = ['atp', *{[what.split()[0], *REFUSED[what]]}]\n"
        "from atp.cli.cli import main\ntry: main()\n"
        "finally: print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    path = os.pathsep.join(filter(None, (str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
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
    assert done.stdout == "atp.models\n", done.stderr


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
def test_a_run_says_before_it_begins_that_kernels_are_missing(
    monkeypatch, capsys, without_extension, tmp_path, command
):
    """The data of this one is a folder without a file, which is found out when it is read."""
    save(tmp_path / "model")
    (tmp_path / "data").mkdir()
    values = {"model": {"path": str(tmp_path / "model")}, "output_dir": str(tmp_path / "out"),
              "data": {"train": str(tmp_path / "data"), "general_share": 0}}  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    code, shown, _ = call(monkeypatch, capsys, command, str(tmp_path / "config.yaml"))
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


HOSTILE = "\x1b[2Jgone\x9b1m\u202e :x: [bold]b[/bold]"
SHOWN = r"\x1b[2Jgone\x9b1m\u202e :x: [bold]b[/bold]"


@pytest.mark.parametrize("terminal", [False, True])
def test_whatever_is_printed_sends_no_control_character_of_its_own(terminal):
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    texts = (HOSTILE, table, Panel(HOSTILE, title="t"), Text(HOSTILE), Text.assemble(("bold", "bold"), HOSTILE))
    for printed in texts:
        file = io.StringIO()
        _Console(file=file, force_terminal=terminal, color_system=None, width=100).print(printed)
        assert SHOWN in file.getvalue() and file.getvalue().replace("\n", "").isprintable(), repr(file.getvalue())


def test_a_name_with_an_escape_sequence_is_shown_in_errors_and_in_lists(monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, "runs", str(tmp_path / "\x1b[2J"))
    assert code == 2 and r"\x1b[2J" in err and "\x1b" not in err
    code, _, err = call(monkeypatch, capsys, "runs", "--\x1b[2Jx")
    assert code == 2 and r"\x1b[2J" in err and "\x1b" not in err
    folder = tmp_path / "\x1b[2Jrun"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    (folder / "metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(monkeypatch, capsys, "runs", ".")
    assert code == 0 and r"\x1b[2Jrun" in out and "\x1b" not in out


TYPED = "hf_" + "TypedByHand0123456789abcdef"


@pytest.mark.parametrize(
    ("words", "secret"),
    [
        (["runs", TYPED], TYPED),
        (["runs", "absent", f"--token={TYPED}"], TYPED),
        (["runs", "absent", "--hub-token", "short-of-form"], "short-of-form"),
        (["train", "absent.yaml", "hub.api_key=0123456789abcdef0123"], "0123456789abcdef0123"),
        (["push", "absent", "wandb_v1_0123456789abcdefghij"], "wandb_v1_0123456789abcdefghij"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_token_that_was_typed_is_shown_nowhere(tmp_path, words, secret):
    for debug in ([], ["--debug"]):
        done = subprocess.run(
            [sys.executable, "-m", "atp", *words, *debug], capture_output=True, text=True, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        assert done.returncode and done.stderr and secret not in done.stdout + done.stderr, done
        assert ("Traceback" in done.stderr) == bool(debug)


def test_the_recorded_command_holds_no_typed_token(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["atp", "train", "c.yaml", "--token", "my-own-secret", f"a={TYPED}", "key=short"])
    assert cli._command() == "atp train c.yaml --token *** a=*** key=short"
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(sys, "argv", ["atp", "train", "c.yaml", f"model.revision={commit}", "training.tokens=12345678"])
    assert cli._command() == " ".join(sys.argv), "neither a commit nor a count of tokens is secret"
