"""Whatever ends a command ends it with one sentence and an exit code, and what can be checked is checked first."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_command import is_one_sentence
from tiny_folder import edit_json, save, write_texts

from atp.ground.ending import OutputClosed, ending
from atp.ground.errors import InputError, Interrupted, NotReached

RUN = [sys.executable, "-c", "from atp.cli.cli import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("ending") / "model")


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts.jsonl")


@pytest.fixture
def config(model, texts, tmp_path):
    values = {
        "model": {"path": str(model)},
        "output_dir": str(tmp_path / "out"),
        "data": {"train": str(texts), "length": 16, "general_share": 0.0},
        "decisions": {"space": "kv_group", "target_keep": 0.594, "saliency_windows": 1, "refit_windows": 1},
        "training": {"batch_size": 4, "search": 1, "settle": 1, "tune": 1, "warmup": 0, "precision": "float32"},
        "evaluation": {"windows": 1, "questions": 0},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def fail(error):
    def failing(*_, **__):
        raise error

    return failing


# The last resort


class Panic(BaseException):
    """As Rust's are, which is no Exception."""


@pytest.mark.parametrize("error", [KeyError("first\nsecond" + "x" * 1000), Panic("first `Option::unwrap()` on `None`")])
def test_an_unforeseen_error_is_one_sentence_and_debug_shows_it(atp, monkeypatch, error):
    monkeypatch.setattr("atp.ground.environment.describe", fail(error))
    code, _, err = atp("env")
    assert code == 1 and is_one_sentence(err) and type(error).__name__ in err and "first" in err and "--debug" in err
    with pytest.raises(type(error)):
        atp("env", "--debug")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EACCES, "check its permissions"),
        (errno.EROFS, "check its permissions"), (errno.EIO, "check the path"),
    ],
)  # fmt: skip
def test_the_system_refuses(number, remedy):
    sentence, code = ending(OSError(number, os.strerror(number), "some/file.json"))
    assert code == 1 and os.strerror(number) in sentence and "some/file.json" in sentence and remedy in sentence


@pytest.mark.parametrize(
    ("told", "remedy"), [("No space left on device (os error 28)", "free some space"),
                         ("File too large (os error 27)", "check the path")],
)  # fmt: skip
def test_the_system_refuses_safetensors(atp, config, monkeypatch, told, remedy):
    from safetensors import SafetensorError

    error = SafetensorError(f"Error while serializing: I/O error: {told}")
    monkeypatch.setattr("atp.training.checkpoint.save_file", fail(error))
    code, _, err = atp("train", config)
    assert code == 1 and is_one_sentence(err) and told in err and remedy in err, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command"),
        (["eval"], "Missing argument"),
        (["eval", "model", "--foo"], "No such option"),
        (["eval", "model", "--documents", "x"], "valid integer"),
        (["train"], "Missing argument"),
    ],
    ids=str,
)
def test_usage_errors_are_is_one_sentence(refused, arguments, message):
    err = refused(*arguments)
    assert message in err and " --help" in err


def test_ctrl_c_is_is_one_sentence(atp, monkeypatch, model):
    monkeypatch.setattr("atp.cli.scoring.score_folder", fail(KeyboardInterrupt()))
    code, _, err = atp("eval", model)
    assert code == 130 and is_one_sentence(err) and "interrupted" in err


def test_nobody_reads():
    """`atp env | head -1` ends as every program does there: in silence, with the code of SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*RUN, "env"], stdout=write, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")
    done = subprocess.run([*RUN, "nope"], stdout=subprocess.PIPE, stderr=write, text=True)
    assert (done.returncode, done.stdout) == (2, ""), "an error keeps its code"
    os.close(write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_on_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*RUN, "env"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and is_one_sentence(done.stderr), done.stderr


def test_ctrl_c_while_the_command_still_imports():
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop())
sys.argv = ["/somewhere/bin/atp", "env"]
from atp.cli.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "") and is_one_sentence(done.stderr), done.stderr
    library = code.replace('sys.argv = ["/somewhere/bin/atp", "env"]', "")
    done = subprocess.run([sys.executable, "-c", library], capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr, "who imports the package keeps Python's behaviour"


# Checked before anything is scored or written


@pytest.fixture
def not_scored(monkeypatch):
    for place in ("atp.run.evaluate_model", "atp.cli.scoring.evaluate_model"):
        monkeypatch.setattr(place, fail(AssertionError("a model was run")))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=/proc/foo", "/proc/foo"),
        ("output_dir={tmp}/link", "{tmp}/link"),
        ("output_dir={tmp}/link/deeper", "{tmp}/link"),
        ("output_dir={tmp}/texts.jsonl/deeper", "{tmp}/texts.jsonl"),
        ("output_dir={tmp}/" + "x" * 300, "File name too long"),
        ('output_dir="a\\0b"', "output_dir"),
        ("training.report_to=[nope]", "training.report_to: there is no tracker 'nope'"),
        ("training.report_to=[wandb]", "training.report_to: tracker 'wandb' is not installed"),
    ],
)
def test_what_train_can_check_it_checks_first(refused, config, tmp_path, not_scored, monkeypatch, override, message):
    import transformers.integrations as integrations

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    assert message.format(tmp=tmp_path) in refused("train", config, override.format(tmp=tmp_path))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [*(("--output", place) for place in ("{}/nope/x.json", "/proc/x.json", "{}/texts.jsonl/x.json", "{}")),
     ("--seed", "-1"), ("--seed", str(2**32))],
)  # fmt: skip
def test_what_eval_can_check_it_checks_first(refused, model, texts, tmp_path, not_scored, option, value):
    options = ("--suite", texts, "--length", 16, "--documents", 2, option, value.format(tmp_path))
    assert option in refused("eval", model, *options)
    assert not (tmp_path / "nope").exists()


@pytest.mark.parametrize("option", ["--runs", "--out"])
def test_the_places_of_an_experiment_are_checked_first(refused, tmp_path, not_scored, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atp.studies.experiments.experiment.load_tokenizer", fail(AssertionError("a model was read")))
    file = Path(__file__).parents[2] / "experiments" / "stages.yaml"
    assert f"{option} /proc/foo is not writable" in refused("experiment", file, option, "/proc/foo")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_tokenizer_beyond_the_embedding_is_refused(refused, config, texts, tmp_path, not_scored, command):
    folder = save(tmp_path / "narrow", vocab_size=12)
    options = ("--suite", texts, "--length", 16) if command == "eval" else (f"model.path={folder}",)
    err = refused(command, folder if command == "eval" else config, *options)
    assert "14 tokens" in err and "12 rows" in err
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_pruned(refused, config, tmp_path):
    folder = save(tmp_path / "quantized")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized" in refused("train", config, f"model.path={folder}")


# Out of memory


def allocate(*_, **__):
    return torch.empty(2**50)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("atp.training.pruning.causal_lm_loss", None),
        ("atp.run.evaluate_model", MemoryError()),
        ("atp.run.evaluate_model", torch.OutOfMemoryError("CUDA out of memory. Tried ...")),
    ],
)
def test_out_of_memory_names_the_three_cheapest_changes(refused, config, monkeypatch, place, error):
    monkeypatch.setattr(place, allocate if error is None else fail(error))
    err = refused("train", config, "training.gradient_accumulation=3")
    changes = ("training.batch_size=2 training.gradient_accumulation=6", "training.gradient_checkpointing=true")
    assert all(told in err for told in ("out of memory", *changes, "evaluation.batch_size=4")), err


def test_out_of_memory_names_only_what_still_helps(refused, config, tmp_path, monkeypatch, model, texts):
    monkeypatch.setattr("atp.training.pruning.causal_lm_loss", allocate)
    err = refused("train", config, "training.gradient_checkpointing=true", f"output_dir={tmp_path / 'one'}")
    assert "training.offload=true" in err
    spent = """training.batch_size=1 training.gradient_checkpointing=true training.offload=true evaluation.batch_size=1
        data.length=32""".split()
    err = refused("train", config, *spent)
    assert "decisions.batch_size=1" in err and "data.length=16" in err and "training." not in err.split("with", 1)[1]
    monkeypatch.setattr("atp.cli.scoring.evaluate_model", allocate)
    err = refused("eval", model, "--suite", texts, "--length", 16, "--documents", 2)
    assert "out of memory" in err and "--batch-size 4" in err and "--length 8" in err


# The table of exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("x"), 1), (OSError(errno.ENOSPC, "full"), 1), (InputError("x"), 2), (torch.OutOfMemoryError("x"), 1),
        (ModuleNotFoundError("x", name="peft"), 2), (NotReached("x"), 3), (Interrupted(signal.SIGHUP, "x"), 129),
        (Interrupted(signal.SIGINT, "x"), 130), (KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM, "x"), 143),
        (BrokenPipeError(errno.EPIPE, "x"), 141), (OutputClosed(), 141),
    ],
    ids=repr,
)  # fmt: skip
def test_each_error_ends_with_a_code_of_the_table(error, code):
    sentence, found = ending(error)
    page = (Path(__file__).parents[2] / "docs" / "operate.md").read_text(encoding="utf-8")
    table = [int(row) for row in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert table == [0, 1, 2, 3, 129, 130, 141, 143]
    assert found == code in table and bool(sentence) == (code != 141)


@pytest.mark.parametrize(
    ("place", "what", "error"),
    [
        ("load_recipe", "data set", MemoryError()), ("read_tokenizer", "tokenizer", MemoryError()),
        ("read_model", "model", torch.OutOfMemoryError("CUDA out of memory. Tried ...")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "eval"])
def test_what_exhausts_memory_at_reading_is_not_told_of_batches(
    refused, config, model, texts, monkeypatch, command, place, what, error
):
    monkeypatch.setattr(f"atp.inputs.loading.{place}", fail(error))
    if command == "eval" and place == "load_recipe":
        monkeypatch.setattr("atp.cli.scoring.read_examples", fail(error))
    words = ["train", config] if command == "train" else ["eval", model, "--suite", texts, "--length", 16]
    err = refused(*words)
    assert f"out of memory while reading the {what} (" in err and "batch" not in err and "with more memory" in err


# Nobody listens


def closed(words, redirections):
    """The command as a shell starts it: (exit code, stdout, stderr)."""
    command = " ".join(map(shlex.quote, [sys.executable, "-m", "atp", *map(str, words)]))
    done = subprocess.run(["sh", "-c", f"{command} {redirections}"], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("redirections", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_output_changes_no_exit_code(tmp_path, redirections):
    for words, code in ((["config", "presets"], 0), (["runs", tmp_path / "none"], 2)):
        found, out, err = closed(words, redirections)
        assert found == code, (words, err)
        assert err == "" if code == 0 or "2>&-" in redirections else is_one_sentence(err)
        assert out == "" or redirections == "2>&-"


@pytest.mark.slow
def test_a_run_without_output_is_whole(config, tmp_path):
    code, _, err = closed(["train", config], ">&- 2>&-")
    folder = tmp_path / "out"
    assert code in (0, 3) and err == "", "3: a tiny model may miss its budget"
    assert (folder / "summary.json").is_file() and (folder / "report.html").is_file()
    text = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml", ".html")]
    assert all(b"report: " not in path.read_bytes() and b"exporting" not in path.read_bytes() for path in text)


@pytest.mark.slow
def test_a_reader_of_one_line_leaves_a_run_that_goes_on(config, tmp_path):
    code, out, err = closed(["train", config], "| head -1")
    assert out.count("\n") == 1 and err == ""
    code, _, err = closed(["train", config, *(["--resume"] if (tmp_path / "out" / "config.yaml").exists() else [])], "")
    assert code in (0, 3) and (tmp_path / "out" / "summary.json").is_file() and "Traceback" not in err
