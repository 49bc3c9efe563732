"""Where no bar can be drawn, lines tell of a command's progress, and no phase is silent for long."""

import json
import math
import sys
import time

import pytest
from rich.console import Console

from atp.ground import progress

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
