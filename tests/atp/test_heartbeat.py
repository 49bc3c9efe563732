"""A process that is no longer heard of ends the others; one that ends, is slow, or was stopped does not."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from atp.ground.errors import InputError
from atp.processes import heartbeat
from atp.processes.heartbeat import Heartbeat

SECONDS = 1.2  # 60 beats of 20 ms


class Pair:
    """Two heartbeats on one store, and what each was told of the other."""

    def __init__(self, stores):
        self.told = [[], []]
        self.hearts = [Heartbeat(store, n, 2, SECONDS, self.told[n].append) for n, store in enumerate(stores)]
        for heart in self.hearts:
            heart.start()


def test_a_process_that_falls_silent_is_lost_and_one_that_has_ended_is_not():
    pair = Pair([HashStore()] * 2)
    time.sleep(2 * SECONDS)
    assert pair.told == [[], []], "both are heard of"
    pair.hearts[1]._say = lambda what: time.sleep(3600)
    time.sleep(0.5 * SECONDS)
    assert pair.told == [[], []], "not yet"
    time.sleep(1.5 * SECONDS)
    (sentence,) = pair.told[0]
    assert sentence.startswith(f"nothing was heard of process 1 on {socket.gethostname()} for 1 s (ATP_LOST_AFTER)")
    pair.hearts[0].stop()
    pair = Pair([HashStore()] * 2)
    pair.hearts[1].stop()
    time.sleep(2 * SECONDS)
    assert pair.told == [[], []]
    pair.hearts[0].stop()


def test_a_store_that_hangs_is_told_as_the_place_where_they_met():
    store = HashStore()
    pair = Pair([store, store])
    time.sleep(0.2 * SECONDS)
    pair.hearts[0].store = pair.hearts[1].store = Hanging()
    time.sleep(2 * SECONDS)
    for told in pair.told:
        assert len(told) == 1 and "the machine where the processes of this run meet" in told[0]


class Hanging:
    def set(self, key, value):
        threading.Event().wait(3600)


def test_a_store_that_is_closed_ends_the_beat_quietly():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    held = TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    client = TCPStore("localhost", port, is_master=False, timeout=timedelta(seconds=5))
    told = []
    heart = Heartbeat(client, 1, 1, SECONDS, told.append)
    heart.start()
    time.sleep(0.2 * SECONDS)
    del held
    time.sleep(2 * SECONDS)
    assert heart.stopped.is_set() and told == []
    heart.stop()


@pytest.mark.parametrize("text", ["soon", "-1", "0.5", "nan", "inf"])
def test_a_variable_that_is_no_number_of_seconds_is_refused(monkeypatch, text):
    monkeypatch.setenv("ATP_LOST_AFTER", text)
    with pytest.raises(InputError, match=f"ATP_LOST_AFTER is '{text}': give seconds from 1 on"):
        heartbeat.begin("name", 0, 2, lambda: None)


def test_zero_turns_it_off(monkeypatch):
    monkeypatch.setenv("ATP_LOST_AFTER", "0")
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("MASTER_PORT", "1")
    heartbeat.begin("name", 0, 2, pytest.fail)


# One process waits for the other, which never comes.
WAITING = """
import sys
from atp.processes import processes
processes.start()
print("met", flush=True)
processes.wait() if processes.rank() == int(sys.argv[1]) else sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="stops a process as a lost machine does")
# The store in which they meet is in process 0.
@pytest.mark.parametrize(("waiting", "lost"), [(0, "process 1"), (1, "the machine where the processes of this run")])
def test_who_waits_for_a_stopped_process_ends(waiting, lost):
    """Two processes meet as on two machines, without a torchrun that would end them both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= os.environ | {"ATP_LOST_AFTER": "5"}
    options = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"text": True, "start_new_session": True}
    command = [sys.executable, "-c", WAITING, str(waiting)]
    both = [subprocess.Popen(command, env=common | {"RANK": rank, "LOCAL_RANK": rank}, **options) for rank in "01"]
    try:
        assert [process.stdout.readline() for process in both] == ["met\n"] * 2
        both[1 - waiting].send_signal(signal.SIGSTOP)
        _, error = both[waiting].communicate(timeout=120)
        assert both[waiting].returncode == 3
        assert f"error: nothing was heard of {lost} " in error and "Traceback" not in error
    finally:
        for process in both:
            process.kill()
            process.communicate()
