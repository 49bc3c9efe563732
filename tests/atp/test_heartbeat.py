"""Processes of a run meet, also when torchrun has started them again, and hear of one another until they end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch.distributed import DistStoreError, HashStore, TCPStore

from atp.ground.ending import ending
from atp.ground.errors import PROCESS_ENDED, InputError, Interrupted, NotReached
from atp.ground.signals import SignalGuard
from atp.inputs.folders import begun_by_this_launch, check_output_dir, opened
from atp.processes import attempts, heartbeat, processes
from atp.processes.heartbeat import Heartbeat
from atp.training.loop import Loop

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


PATIENCE = timedelta(seconds=30)
LOST = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
# A process that exchanges, twice, with another one that ends after the first time.
EXCHANGE = """
import os, sys, torch, torch.distributed as dist
store = dist.FileStore(sys.argv[2], 2)
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
dist.all_reduce(torch.ones(1))
if rank == 1:
    os._exit(1)
from atp.ground.ending import ending
try:
    dist.all_reduce(torch.ones(1))
except Exception as error:
    print(error)
    print(type(error).__name__, ending(error))
"""


def met(store, count, late=0.0):
    """The stores of all processes of one start, the main one of which comes `late` seconds after the others."""
    found = {}

    def come(rank):
        found[rank] = attempts.of_this_start(store, rank, count, PATIENCE)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(1, count)]
    threads.append(threading.Timer(late, come, args=(0,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(count)]


@pytest.mark.parametrize("count", [2, 5])
def test_no_process_sees_what_an_earlier_start_has_left(count):
    store = HashStore()
    first = met(store, count)
    for rank, each in enumerate(first):
        each.set(f"address/{rank}", "gone")
    second = met(store, count, late=0.1)
    assert not any(each.check([f"address/{rank}"]) for each in second for rank in range(count))
    second[1].set("address/1", "here")
    assert [each.get("address/1") for each in second] == [b"here"] * count
    assert first[0].get("address/1") == b"gone"


def test_calls_of_a_start_that_never_came_about_are_no_arrivals():
    store = HashStore()
    store.set("atp/caller/1", "killed before it was answered")
    for rank in (0, 1):
        with pytest.raises(DistStoreError, match="not all processes of this run came"):
            attempts.of_this_start(store, rank, 2, timedelta(seconds=0.1))
    zero, one = met(store, 2)
    zero.set("key", "value")
    assert one.get("key") == b"value"


def test_processes_meet_in_the_store_of_torchrun_alone(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert attempts.meeting() == {}, "torch's own way is good where no store outlives the processes"
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = threading.Thread(target=attempts.of_this_start, args=(server, 1, 2, PATIENCE))
    other.start()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    found = attempts.meeting()
    other.join()
    assert (found["rank"], found["world_size"]) == (0, 2)
    found["store"].set("key", "value")
    assert not server.check(["key"])


def test_a_folder_belongs_to_the_launch_that_began_it(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    with opened(folder, resume=False):
        assert not begun_by_this_launch(folder), "killed before there is a config, a run starts anew"
        check_output_dir(folder, resume=False)
        (folder / "config.yaml").write_text("{}", encoding="utf-8")
    assert begun_by_this_launch(folder)
    for other in ("second", "none", ""):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", other)
        assert not begun_by_this_launch(folder), other
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not begun_by_this_launch(folder)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    (folder / ".launch").unlink()
    assert not begun_by_this_launch(folder)


def test_whoever_is_left_by_another_process_ends_with_one_sentence(tmp_path, monkeypatch):
    both = [
        subprocess.Popen([sys.executable, "-c", EXCHANGE, rank, tmp_path / "store"], stdout=subprocess.PIPE, text=True,
                         env=os.environ | {"WORLD_SIZE": "2"}) for rank in "01"
    ]  # fmt: skip
    output = both[0].communicate(timeout=120)[0]
    both[1].communicate(timeout=120)
    assert output.splitlines()[-1] == f"RuntimeError {(PROCESS_ENDED, 3)}"
    monkeypatch.setenv("WORLD_SIZE", "1")
    lost = RuntimeError(LOST)
    assert ending(lost)[1] == 1, "one process alone has lost nobody"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ending(lost) == (PROCESS_ENDED, 3)
    for other in (RuntimeError("[gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes"),
                  ConnectionResetError("Connection reset by peer")):  # fmt: skip
        assert ending(other)[1] == 1, "what is no lost process is told as it is"


def test_a_process_that_heard_the_signal_too_ends_by_it_where_the_other_has_gone(monkeypatch):
    """One that was not training yet ends at once; the others hear of it in their next exchange."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    for error in (RuntimeError(LOST), NotReached(PROCESS_ENDED)):
        loop = SimpleNamespace(signals=SignalGuard(), _tell=lambda event: None)
        with pytest.raises(Interrupted, match="^interrupted by signal 15: continue with --resume$"), Loop.session(loop):
            os.kill(os.getpid(), signal.SIGTERM)
            raise error
        with pytest.raises(NotReached, match="^another process of this run has ended"), Loop.session(loop):
            raise error
    with pytest.raises(NotReached, match="^losses$"), Loop.session(loop):
        raise NotReached("losses")
