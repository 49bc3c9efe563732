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
from launched_runs import ended, wait_for_steps, write_settings
from torch.distributed import HashStore, TCPStore

from atp import heartbeat
from atp.errors import InputError
from atp.heartbeat import Heartbeat

SECONDS = 1.2  # 60 beats of 20 ms


class Pair:
    """Two heartbeats on one store, and what each was told of the other."""

    def __init__(self, stores):
        self.told = [[], []]
        self.hearts = [Heartbeat(store, n, 2, SECONDS, self.told[n].append) for n, store in enumerate(stores)]
        for heart in self.hearts:
            heart.start()


def test_a_process_that_falls_silent_is_lost():
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


def test_a_process_that_has_ended_is_not():
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


def two_processes(arguments):
    """Two processes of one command, that meet as on two machines, without a torchrun that would end them both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"ATP_LOST_AFTER": "10"}  # a busy machine keeps a process from beating for some seconds
    return [
        subprocess.Popen(
            [sys.executable, "-m", "atp", *arguments], env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )
        for rank in "01"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="stops a process as a lost machine does")
def test_a_run_whose_other_process_is_stopped_ends_and_resumes(config, tmp_path):
    settings, _ = write_settings(config, tmp_path)
    command = ["train", str(settings), f"output_dir={tmp_path / 'run'}"]
    # Without torchrun the store in which they met is in process 0.
    lost = "the machine where the processes of this run meet", "process 1"
    for stopped, steps, more in ((1, 2, []), (0, 4, ["--resume"])):
        both = two_processes([*command, *more])
        try:
            wait_for_steps(both[1 - stopped], tmp_path / "run", steps)
            both[stopped].send_signal(signal.SIGSTOP)
            output = ended(both[1 - stopped], code=3)
            assert f"error: nothing was heard of {lost[stopped]} on " in output and "Traceback" not in output
        finally:
            both[stopped].kill()
            both[stopped].communicate()
    main, other = map(ended, two_processes([*command, "--resume"]))
    assert "Result" in main and "nothing was heard" not in main + other
