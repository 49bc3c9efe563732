"""A slice of the fuzzed native calls, and that the harness notices what it is there for."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sanitize

from atp_kernels import extension

if not extension.AVAILABLE:
    pytest.skip(extension.REASON, allow_module_level=True)
import fuzz_native


def test_every_native_operation_is_called_and_only_operands_that_do_not_fit_are_refused():
    outcomes = {fuzz_native.run_case(number) for number in range(300)}
    assert outcomes <= {f"{name}: {how}" for name in fuzz_native.CASES for how in ("accepted", "refused")}
    assert {name.partition(":")[0] for name in outcomes} == fuzz_native.CASES.keys()
    source = (Path(__file__).parents[1] / "csrc" / "module.cpp").read_text(encoding="utf-8")
    defined = {part.partition("(")[0].strip(' "\n') for part in source.split("m.def(")[1:-1]}
    assert defined == fuzz_native.CASES.keys()


def refuse(*operands):
    raise RuntimeError("no")


def test_a_refusal_of_operands_that_fit_is_a_failure(monkeypatch):
    ops = SimpleNamespace(**dict.fromkeys(fuzz_native.CASES, refuse))
    monkeypatch.setattr(fuzz_native, "extension", SimpleNamespace(ops=ops))
    failed = []
    for number in range(20):
        try:
            fuzz_native.run_case(number)
        except AssertionError as error:
            failed.append(str(error))
    assert 0 < len(failed) < 20
    assert all("refuses operands that fit: no" in message for message in failed)


def test_an_unreported_fault_ends_the_program(monkeypatch, tmp_path):
    """Where the sanitizer is silent nothing would be checked."""
    (tmp_path / "atp_kernels").mkdir()
    (tmp_path / "atp_kernels" / "_C.so").touch()
    silent = SimpleNamespace(returncode=0, stdout="7")
    monkeypatch.setattr(sanitize, "run", lambda *arguments: silent)
    with pytest.raises(SystemExit, match="does not report atp_fault_heap.7. as 'heap-buffer-overflow'"):
        sanitize.check_faults("address", tmp_path)
    silent.returncode, silent.stdout = 66, "WARNING: ThreadSanitizer: data race"
    sanitize.check_faults("thread", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_sets_run_here_hold_the_one_that_is_picked():
    assert extension.build_info()["isa"] in [*sanitize.isas(), "baseline"]
