"""Work in a child process: no crash and no hang reaches the caller, and the next job is done."""

import os
import sys
import tempfile

import pytest

from atp_kernels import child
from atp_kernels.child import Child, Lost

ENDS = [
    ("crashes", "the process ended with signal SIGABRT"),
    ("hangs", "it was not done after 1 s"),
    ("raises", "ValueError: no"),
    ("hangs at its end", "the process hung at its end"),
    ("exits", "the process ended with exit status 3 (the last words)"),
]


@pytest.fixture(scope="module")
def worker():
    """One child for all tests; those in which it is lost start another one."""
    with Child("injected:behaves", {"ATP_KERNELS_TABLES": None}) as found:
        yield found


def test_jobs_are_done_by_one_process_after_the_other_with_its_own_variables(worker):
    first, second = worker.call("works", 60), worker.call("works", 60)
    assert first == second == {"pid": first["pid"], "tables": None} and first["pid"] != os.getpid()


@pytest.mark.parametrize(("job", "why"), ENDS)
def test_a_job_that_is_lost_says_why_and_what_it_was_at(worker, monkeypatch, job, why):
    monkeypatch.setattr(child, "_END_SECONDS", 2.0)
    with pytest.raises(Lost) as lost:
        worker.call(job, 1 if job == "hangs" else 60)
    assert str(lost.value) == why and lost.value.at == job


def test_the_next_job_is_done_by_another_process(worker):
    before = worker.call("works", 60)["pid"]
    with pytest.raises(Lost):
        worker.call("raises", 60)
    assert worker.call("works", 60)["pid"] != before


def test_a_process_that_is_closed_is_gone(worker):
    pid = worker.call("works", 60)["pid"]
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(("function", "said"), [
    ("no_such_module:work", "No module named 'no_such_module'"), ("injected:nothing", "no attribute 'nothing'"),
])  # fmt: skip
def test_a_child_that_does_not_start_was_at_nothing(function, said):
    with Child(function) as worker, pytest.raises(Lost, match=said) as lost:
        worker.call("works", 60)
    assert lost.value.at is None


@pytest.mark.parametrize("missing", ["interpreter", "temporary folder"])
def test_what_is_not_there_to_start_one_is_no_other_error(monkeypatch, missing):
    if missing == "interpreter":
        monkeypatch.setattr(sys, "executable", "/no/such/python")
    else:
        monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with Child("injected:behaves") as worker, pytest.raises(Lost, match="no child process starts") as lost:
        worker.call("works", 60)
    assert lost.value.at is None


def test_a_child_that_is_slow_to_start_is_given_up(monkeypatch):
    monkeypatch.setattr(child, "START_SECONDS", 0.01)
    with Child("injected:behaves") as worker, pytest.raises(Lost, match="not done after 0.01 s") as lost:
        worker.call("works", 60)
    assert lost.value.at is None
