"""A command tells of its progress: in lines where no bar can be drawn, by something that moves on a terminal."""

import io
import json
import math
import sys
import threading
import time

import pytest
from rich.console import Console
from tiny_command import start

from atp.ground import progress
from atp.training.callbacks import make_progress

RECORD = {"step": 3, "loss": 1.25, "keep": 0.5, "tokens_per_second": 1234.4, "lr": 0.1}


def test_text_off_a_terminal_and_json_with_the_same_keys_in_every_step_and_no_nan(capsys):
    with progress.logged(as_json=False):
        progress.begin("search")
        progress.begin("search")
        progress.step("search", RECORD, 10)
    lines = capsys.readouterr().out.splitlines()
    assert [line[9:] for line in lines] == ["search", "search 3/10  loss 1.250  kept 0.500  1,234 tok/s"]
    assert all(time.strptime(line[:8], "%H:%M:%S") for line in lines)
    with progress.logged(as_json=True):
        progress.step("tune", RECORD, 10)
        progress.step("tune", {"step": 4, "loss": math.nan, "tokens_per_second": math.inf}, 10)
    out, err = capsys.readouterr()
    begun, first, second = (json.loads(line, parse_constant=pytest.fail) for line in err.splitlines())
    assert out == "" and begun.keys() == {"time", "phase"} and first.keys() == second.keys()
    assert (second["loss"], second["kept"], second["tokens_per_second"]) == (None, None, None)


def test_nothing_on_a_terminal_or_without_a_log(capsys, monkeypatch):
    progress.step("search", RECORD, 10)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with progress.logged(as_json=False):
        progress.begin("search")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_with_quiet(capsys, monkeypatch, as_json):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)  # noqa: B023
        console = Console(force_terminal=terminal)
        with progress.logged(as_json, console=console, quiet=True, quiet_seconds=0.01):
            progress.begin("search")
            progress.step("search", RECORD, 10)
            with progress.Bars(console=console) as bars:
                bars.add_task("dense", total=10)
                time.sleep(0.3)
            assert progress.error("no such file") is False, "the command says it itself"
            progress.end()
    assert capsys.readouterr() == ("", "")


def test_lines_keep_out_of_a_result_on_stdout_and_end_with_the_command(capsys):
    with progress.logged(as_json=False, stdout_taken=True, quiet_seconds=0.01):
        progress.begin("counting")
        progress.end()
        assert capsys.readouterr()[1][9:] == "counting\n"
        time.sleep(0.2)
        assert capsys.readouterr() == ("", ""), "and end before it"
        progress.begin("cut")
    capsys.readouterr()
    time.sleep(0.2)
    progress.begin("tune")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_quiet_phase_says_that_it_goes_on(capsys, as_json):
    lines, end = [], time.monotonic() + 60
    with progress.logged(as_json=as_json, quiet_seconds=0.05):
        progress.begin("saliency")
        progress.count(3, 40)
        while len(lines) < 3 and time.monotonic() < end:
            time.sleep(0.02)
            out, err = capsys.readouterr()
            lines += (err if as_json else out).splitlines()
    if as_json:
        assert {"phase": "saliency", "done": "3/40"}.items() <= json.loads(lines[2]).items()
    else:
        assert lines[2][9:].startswith("saliency 3/40, for ")


def test_the_sentence_that_ends_a_command_is_json_too_and_shows_no_secret(atp, monkeypatch):
    code, _, err = atp("train", "absent.yaml", "--json-logs")
    *_, line = err.splitlines()
    assert code == 2 and "absent.yaml" in json.loads(line)["error"]
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret_42\n")
    _, _, err = atp("train", "hf_planted_secret_42.yaml")
    assert "***.yaml" in err and "planted" not in err


def test_a_line_sends_no_control_character_and_no_typed_token(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["atp", "chat", "--token", "typed-secret"])
    with progress.logged(as_json=False):
        progress.begin("loading \x1b[2J typed-secret")
    assert capsys.readouterr().out.endswith("loading \\x1b[2J ***\n")


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 100 columns: (console, screen)."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=100), file


def frames(file, seconds):
    file.seek(0)
    file.truncate()
    time.sleep(seconds)
    return file.getvalue().split("\r")


def test_a_phase_without_bars_moves(screen):
    console, file = screen
    with progress.logged(as_json=False, console=console):
        progress.begin("certificate")
        drawn = frames(file, 1.0)
        assert len({frame for frame in drawn if "certificate" in frame}) >= 3, "the sign turns"
        progress.begin("export")
        assert "export" in frames(file, 0.5)[-1]
        progress.end()
        assert frames(file, 0.3) == [""], "nothing moves beside a result"
        progress.begin("again")
        assert "again" in frames(file, 0.3)[-1]
    assert "again" not in frames(file, 0.3)[-1], "and is gone with the command"
    with progress.logged(as_json=False, console=console):
        progress.begin("loading")
        assert progress.error("no such file") is False
        assert frames(file, 0.5) == [""], "so that the sentence stands alone"


def test_bars_move_without_an_update_and_name_the_phase(screen):
    console, file = screen
    with progress.logged(as_json=False, console=console):
        progress.begin("loading")
        with make_progress() as bars:
            bars.add_task("dense", total=10, note="loss 1.0")
            progress.begin("saliency")
            drawn = frames(file, 1.0)
            assert len({frame for frame in drawn if "saliency" in frame}) >= 3 and "loading" not in "".join(drawn)
        assert "saliency" in frames(file, 0.5)[-1], "the sign is back when the bars have ended"


def test_names_are_shown_as_they_are(screen):
    console, file = screen
    with progress.logged(as_json=False, console=console):
        progress.begin("loading runs/[/b][bold]x")
        assert "loading runs/[/b][bold]x" in frames(file, 0.5)[-1]
        with progress.Bars(console=console) as bars:
            bars.add_task("task [/i]", total=10)
            drawn = frames(file, 0.5)[-1]
            assert "task [/i]" in drawn and "[progress" not in drawn


def test_something_moves_in_all_of_a_run(screen, config, tmp_path):
    """By what is on the terminal at each moment, which no slow machine changes."""
    console, file = screen
    moving, ended = [], threading.Event()

    def look(sign):
        while not ended.wait(0.01):
            moving.append((sign.phase, sign.shown is not None or sign.bars > 0))

    with progress.logged(as_json=False, console=console):
        sign = progress._open.get()
        progress.begin("starting")
        watcher = threading.Thread(target=look, args=(sign,))
        watcher.start()
        start(config, tmp_path / "run", say=console.print)
        ended.set()
        watcher.join()
    still = "".join("." if moves else "#" for _, moves in moving)
    assert "##########" not in still, [phase for phase, moves in moving if not moves]
    seen = {phase for phase, _ in moving}
    assert {"loading", "search", "settle", "tune", "export", "report"} <= seen, seen
