"""Processes that torchrun has started again meet one another, and the run goes on; not so those of another launch."""

import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch.distributed import DistStoreError, HashStore, TCPStore

from atp.ground.ending import ending
from atp.ground.errors import PROCESS_ENDED, Interrupted, NotReached
from atp.ground.signals import SignalGuard
from atp.inputs.folders import begun_by_this_launch, check_output_dir, opened
from atp.processes import attempts, processes
from atp.training.loop import Loop

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
