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
def test_a_job_that_is_lost_says_why_and_the_next_is_done_by_another_process(worker, monkeypatch, job, why):
    monkeypatch.setattr(child, "_END_SECONDS", 2.0)
    before = worker.call("works", 60)["pid"]
    with pytest.raises(Lost) as lost:
        worker.call(job, 1 if job == "hangs" else 60)
    assert str(lost.value) == why and lost.value.at == job
    assert worker.call("works", 60)["pid"] != before


def test_a_process_that_is_closed_is_gone(worker):
    pid = worker.call("works", 60)["pid"]
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(("function", "place", "said"), [
    ("no_such_module:work", None, "No module named 'no_such_module'"),
    ("injected:nothing", None, "no attribute 'nothing'"),
    ("injected:behaves", (sys, "executable", "/no/such/python"), "no child process starts"),
    ("injected:behaves", (tempfile, "tempdir", "/no/such/folder"), "no child process starts"),
    ("injected:behaves", (child, "START_SECONDS", 0.01), "not done after 0.01 s"),
])  # fmt: skip
def test_a_child_that_does_not_start_was_at_nothing(monkeypatch, function, place, said):
    if place:
        monkeypatch.setattr(*place)
    with Child(function) as worker, pytest.raises(Lost, match=said) as lost:
        worker.call("works", 60)
    assert lost.value.at is None
