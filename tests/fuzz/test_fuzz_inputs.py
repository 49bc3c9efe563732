"""A slice of the fuzzed inputs, and that the harness notices what it is there for."""

import time

import fuzz_inputs
import pytest

from atp.ground.errors import InputError

FEWER = {"report": 5, "gguf": 10}  # the slow ones
SLICE = {kind: FEWER.get(kind, 30) for kind in fuzz_inputs.CASES}


def broken_by(error):
    def case(draw, folder):
        raise error

    return case


@pytest.mark.parametrize("kind", fuzz_inputs.CASES)
def test_broken_input_is_one_short_sentence(kind, tmp_path):
    outcomes = set()
    for number in range(SLICE[kind]):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes.add(fuzz_inputs.run_case(kind, number, folder))
    assert outcomes <= {"accepted", "refused"} and (kind == "report" or "refused" in outcomes)


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), InputError("x" * 5000), InputError("")])
def test_the_harness_notices_tracebacks_and_long_messages(error, tmp_path, monkeypatch):
    monkeypatch.setitem(fuzz_inputs.CASES, "config", (broken_by(error), 1))
    with pytest.raises((KeyError, RecursionError, AssertionError)):
        fuzz_inputs.run_case("config", 0, tmp_path)


def work(seconds):
    while time.process_time() < seconds:
        pass


@pytest.mark.parametrize(("limit", "spend"), [("SECONDS", lambda: work(time.process_time() + 10)),
                                              ("WAITED", lambda: time.sleep(10))])  # fmt: skip
def test_the_harness_notices_what_takes_too_long(tmp_path, monkeypatch, limit, spend):
    monkeypatch.setattr(fuzz_inputs, limit, 0.2)
    monkeypatch.setitem(fuzz_inputs.CASES, "config", (lambda draw, folder: spend(), 1))
    with pytest.raises(fuzz_inputs.TooSlow):
        fuzz_inputs.run_case("config", 0, tmp_path)
