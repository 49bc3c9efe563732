"""What whole runs, comparisons and experiments are tested on, and what keeps hundreds of them quick."""

import gc
import os
import sys
from functools import partial

import pytest
import transformers
from tiny_command import is_one_sentence, start
from tiny_inputs import tiny_config

import atp.cli.scoring
import atp.run
from atp.evaluation import throughput, throughputs
from atp.report import plots, write_report

gc.disable()  # until all tests are collected: importing them makes no garbage worth looking for


@pytest.fixture(scope="session", autouse=True)
def quick_runs():
    """A run decodes few tokens to measure speed, and its report has no drawings, which test_report.py draws.

    Nothing waits for the disk: only a machine that loses power could tell.
    """

    def without_drawings(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "available", lambda: False)
            return write_report(folder)

    few = {"prompt_tokens": 16, "new_tokens": 2, "repeats": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(atp.run, "throughputs", partial(throughputs, **few))
        patch.setattr(atp.cli.scoring, "throughput", partial(throughput, **few))
        patch.setattr(atp.run, "write_report", without_drawings)
        yield


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A tiny model and labelled questions whose answer is in the text."""
    return tiny_config(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(name="atp")
def command_line(monkeypatch, capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""
    from atp.cli.cli import main

    logs = transformers.utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    # rich asks the environment for the width of the terminal.
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["atp", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, *capsys.readouterr()

    yield run
    logs.set_verbosity(verbosity)
    if bars:
        logs.enable_progress_bar()


@pytest.fixture
def refused(atp):
    """Runs a command that ends with exit code 2 and one sentence, which it returns."""

    def run(*words):
        code, _, err = atp(*words)
        assert code == 2 and is_one_sentence(err), err
        return err

    return run


@pytest.fixture
def wide_budget(monkeypatch):
    """One channel of the tiny model is more than the tolerance on the budget."""
    monkeypatch.setattr("atp.inputs.promises.BUDGET_TOLERANCE", 0.02)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The folder of a run that was never broken off."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    start(config, folder)
    return folder
