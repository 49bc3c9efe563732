"""A signal ends a run the same way wherever it is: one message, 128 + signal, and --resume ends as if it had not."""

import os
import signal

import pytest
from tiny_command import results, start

from atp import run as runs
from atp.baselines import tuner
from atp.export import hf
from atp.ground.errors import Interrupted
from atp.studies.compare import Comparison, baseline_run
from atp.training import pruning

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("wide_budget", "hangup")]


@pytest.fixture
def hangup():
    """SIGHUP as a terminal's child has it: a parent such as nohup leaves it ignored."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, usual)


def signalled(patch, where, name, signum, after=0):
    """Sends this process a signal in the call `after` of a function, which would go on otherwise."""
    function, calls = getattr(where, name), []

    def send(*arguments, **options):
        calls.append(name)
        if len(calls) == after + 1:
            os.kill(os.getpid(), signum)
        return function(*arguments, **options)

    patch.setattr(where, name, send)


PLACES = {
    "scoring the original": (runs, "evaluate_model", signal.SIGTERM),
    "wrapping for the dense baseline": (runs, "add_lora", signal.SIGHUP),
    "scoring the dense baseline": (runs, "evaluate_model", signal.SIGINT, 1),
    "saliency": (pruning, "fisher_saliency", signal.SIGHUP),
    "cut": (pruning, "cut_model", signal.SIGTERM),
    "export": (hf, "as_stored", signal.SIGINT),
    "certificate": (hf, "certify_export", signal.SIGHUP),
    "scoring the result": (runs, "evaluate_model", signal.SIGTERM, 2),
    "report": (runs, "write_report", signal.SIGHUP),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_outside_the_steps_ends_like_one_inside(config, finished, tmp_path, monkeypatch, place):
    out = tmp_path / "out"
    signum = PLACES[place][2]
    usual = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        signalled(patch, *PLACES[place])
        with pytest.raises(Interrupted, match=rf"^interrupted by signal {int(signum)}: continue with --resume") as stop:
            start(config, out)
    assert stop.value.signum == signum and signal.getsignal(signum) == usual
    assert not list(out.rglob(".writing-*"))
    start(config, out, resume=True)
    assert results(out) == results(finished)


def test_a_signal_while_loading_says_that_nothing_was_written(config, tmp_path, monkeypatch):
    signalled(monkeypatch, runs, "load_model", signal.SIGHUP)
    with pytest.raises(Interrupted, match="^interrupted by signal 1: nothing was written yet, start again$"):
        start(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_command_prints_one_line_and_returns_128_plus_the_signal(config, tmp_path, monkeypatch, atp, signum):
    path = tmp_path / "config.yaml"
    path.write_text(config.model_copy(update={"output_dir": str(tmp_path / "out")}).dump())
    signalled(monkeypatch, runs, "evaluate_model", signum)
    code, _, err = atp("train", path)
    assert code == 128 + signum and err.count("\n") == 1 and "continue with --resume" in err and "Traceback" not in err


def test_a_comparison_ends_and_goes_on(config, tmp_path, monkeypatch):
    def compare(name, resume=False):
        Comparison(config, ["random"], [0], tmp_path / name, resume=resume, command="atp compare").execute()

    compare("whole")
    for where, name in ((baseline_run, "write_tensors"), (hf, "as_stored"), (tuner, "set_seed")):
        with monkeypatch.context() as patch:
            signalled(patch, where, name, signal.SIGTERM)
            with pytest.raises(Interrupted, match="^interrupted by signal 15: continue with --resume$"):
                compare(name)
        compare(name, resume=True)
        assert results(tmp_path / name / "random-seed0") == results(tmp_path / "whole" / "random-seed0")
