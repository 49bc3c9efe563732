"""The command itself: its version, its help, and what it says before a run."""

import io
import json
import os
import re
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
from atp.ground.environment import commit_of, slow_kernels
from atp_kernels._version import __version__

AUTO = "from transformers import AutoConfig, AutoModelForCausalLM"

COMMANDS = "train plan demo eval compare experiment sweep frontier export report chat push env".split()


def test_help_lists_every_command_and_short_help_is_the_long_one_with_an_example(atp):
    code, out, _ = atp("--help")
    assert code == 0 and atp("-h")[1] == out
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\b", out, flags=re.MULTILINE), command
        short, long = (atp(command, option) for option in ("-h", "--help"))
        assert short == long and short[0] == 0 and f"Example: atp {command}" in short[1]


HELP = ("--help", "train --help", "export --help")
# What is refused -> words of its sentence.
REFUSED = {
    "train no.yaml": "no.yaml does not exist",
    "compare config.yaml --methods atp,magnitud": "method 'magnitud' is unknown: did you mean 'magnitude'",
    "compare config.yaml --methods ,": "nothing to compare",
    "compare config.yaml --seeds one": "seed 'one' is not an integer",
    "eval model --precision int4": "--precision int4 is unknown: use auto, float32 or bfloat16",
    "report nowhere": "does not exist: give the output_dir of a run",
} | dict.fromkeys(
    """train config.yaml lora.rank=2; train config.yaml model.path=./nowhere; train config.yaml data.train=absent.jsonl;
    train config.yaml decisions.space=heads; train config.yaml output_dir=model; plan config.yaml model.path=a/b/c;
    compare config.yaml --on mars; compare config.yaml --out model; experiment nothing; experiment stages --seeds one;
    experiment stages lora.rank=2; sweep config.yaml --keep 2; sweep config.yaml --keep 0.8,0.8;
    sweep config.yaml --on mars; sweep config.yaml --out model; eval ./nowhere; eval model --suite absent.jsonl;
    eval model --suite absent.yaml; eval model --output no/scores.json; export model/absent.gguf;
    export model --to onnx; export model --dtype int3; export model --out no/such.gguf; chat runs/demo/model;
    chat model --against ../nowhere; push ./nowhere me/small; push model small; runs nowhere;
    init model data.jsonl --out no/atp.yaml; demo lora.rank=2""".split(";"), ""
)  # fmt: skip
TYPED = "hf_" + "TypedByHand0123456789abcdef"
TOKENS = {
    "a name": (["runs", TYPED], TYPED),
    "--token": (["runs", "absent", f"--token={TYPED}"], TYPED),
    "--hub-token": (["runs", "absent", "--hub-token", "short-of-form"], "short-of-form"),
    "api_key": (["train", "absent.yaml", "hub.api_key=0123456789abcdef0123"], "0123456789abcdef0123"),
    "of wandb": (["push", "absent", "wandb_v1_0123456789abcdefghij"], "wandb_v1_0123456789abcdefghij"),
}
# Each command in a process that is forked from one that has imported what a command imports first.
FORKS = """
import json, os, sys, tempfile
sys.argv = ["atp"]
from atp.cli.cli import main
ends = []
for words in json.loads(sys.stdin.read()):
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if not child:
        code = 1
        for file, number in zip(files, (1, 2)):
            os.dup2(file.fileno(), number)
        sys.argv = ["atp", *words]
        try:
            main()
        except SystemExit as done:
            code = done.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            print([name for name in ("torch", "transformers", "peft", "datasets") if name in sys.modules])
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ends.append([code, *(file.seek(0) or file.read() for file in files)])
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Name -> (exit code, stdout and the slow libraries that were imported, stderr) of the commands above."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "data.jsonl").write_text('{"text": "the cat"}', encoding="utf-8")
    values = {"model": {"path": "model"}, "output_dir": "out", "data": {"train": "data.jsonl"}}
    (folder / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    commands = {text: text.split() for text in (*HELP, *REFUSED)} | {name: words for name, (words, _) in TOKENS.items()}
    commands |= {f"{name}, debug": [*words, "--debug"] for name, (words, _) in TOKENS.items()}
    path = os.pathsep.join(filter(None, (str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=json.dumps(list(commands.values())), capture_output=True, text=True,
        cwd=folder, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("what", HELP)
def test_help_waits_for_no_library_that_takes_seconds(ended, what):
    code, out, err = ended[what]
    assert (code, err) == (0, "") and out.startswith("Usage: atp") and out.endswith("[]\n")


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_argument_is_refused_without_the_libraries_that_take_seconds(ended, what):
    """By the set of modules, which no slow machine changes."""
    code, out, err = ended[what]
    assert code == 2, err
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err and out.endswith("[]\n")
    assert REFUSED[what] in err


@pytest.mark.parametrize("what", TOKENS)
def test_a_token_that_was_typed_is_shown_nowhere(ended, what):
    for name, debug in ((what, False), (f"{what}, debug", True)):
        code, out, err = ended[name]
        assert code and err and TOKENS[what][1] not in out + err, (out, err)
        assert ("Traceback" in err) == debug


def test_the_package_imports_no_library_and_is_a_command_of_which_a_shell_completes_others():
    """Nothing that Python does not bring: by the set of modules, which no slow machine changes."""
    code = (
        "import sys; before = set(sys.modules)\nimport atp\nnew = {name.partition('.')[0] for name in sys.modules}"
        "\nprint(sorted(new - before - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['atp']\n", done.stderr
    asked = {"_ATP_COMPLETE": "complete_bash", "COMP_WORDS": "atp tr", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "atp"], capture_output=True, text=True, env={**os.environ, **asked})
    assert (done.returncode, done.stdout, done.stderr) == (0, "train\n", "")
    done = subprocess.run([sys.executable, "-m", "atp", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"atp {__version__}\n"), done.stderr


IMPORTS = """
import json, os, sys, torch
for code in json.loads(sys.stdin.read()):
    child = os.fork()
    if not child:
        try:
            exec(code, {})
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_program_that_imports_the_package_can_load_a_cut_model():
    load = (
        "\nsizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)\n"
        "config = AutoConfig.for_model('atp_llama', vocab_size=8, **sizes)\n"
        "print(type(AutoModelForCausalLM.from_config(config)).__module__)"
    )
    orders = [
        f"{AUTO}; import atp",
        # These import the Auto classes while they are themselves half imported.
        f"import atp, transformers.models.llama.modeling_llama; {AUTO}",
        f"import atp; atp.ATPConfig; {AUTO}",
    ]
    codes = json.dumps([order + load for order in orders])
    done = subprocess.run([sys.executable, "-c", IMPORTS], input=codes, capture_output=True, text=True)
    assert done.stdout == "atp.models\n" * len(orders), done.stderr


@pytest.fixture
def without_extension(monkeypatch):
    reasons = {"native": "the extension is on holiday"}
    monkeypatch.setattr(atp_kernels, "available_backends", lambda: reasons)
    return reasons


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_run_says_before_it_begins_that_kernels_are_missing(atp, without_extension, tmp_path, command):
    save(tmp_path / "model")
    (tmp_path / "data").mkdir()  # without a file, which is found out when it is read
    values = {"model": {"path": str(tmp_path / "model")}, "output_dir": str(tmp_path / "out"),
              "data": {"train": str(tmp_path / "data"), "general_share": 0}}  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    code, shown, _ = atp(command, tmp_path / "config.yaml")
    assert code == 2 and "the extension is on holiday" in shown and "ATP_BUILD=0" in shown


def test_who_wants_no_extension_hears_nothing(monkeypatch, without_extension):
    assert slow_kernels()
    monkeypatch.setenv("ATP_BUILD", "0")
    assert slow_kernels() is None
    monkeypatch.delenv("ATP_BUILD")
    for reason in ("the extension was not built, since ATP_BUILD=0 says so", None):
        without_extension["native"] = reason
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


def test_a_name_with_an_escape_sequence_is_shown_in_errors_and_in_lists(monkeypatch, atp, tmp_path):
    for word in (tmp_path / "\x1b[2J", "--\x1b[2Jx"):
        code, _, err = atp("runs", word)
        assert code == 2 and r"\x1b[2J" in err and "\x1b" not in err
    folder = tmp_path / "\x1b[2Jrun"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    (folder / "metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    code, out, _ = atp("runs", ".")
    assert code == 0 and r"\x1b[2Jrun" in out and "\x1b" not in out


def test_the_recorded_command_holds_no_typed_token(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["atp", "train", "c.yaml", "--token", "my-own-secret", f"a={TYPED}", "key=short"])
    assert cli._command() == "atp train c.yaml --token *** a=*** key=short"
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(sys, "argv", ["atp", "train", "c.yaml", f"model.revision={commit}", "training.tokens=12345678"])
    assert cli._command() == " ".join(sys.argv), "neither a commit nor a count of tokens is secret"


def test_the_commit_of_a_checkout(tmp_path):
    """Rows of experiments name it; a + says that files differ from it."""
    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert commit_of(tmp_path) is None, "nothing is committed"
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert commit_of(tmp_path) == head[:10]
    (tmp_path / "file").write_text("two")
    assert commit_of(tmp_path) == head[:10] + "+"
