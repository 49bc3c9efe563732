"""Where the processes of a run meet when torchrun may have started them before.

With `--max-restarts` torchrun starts all processes anew when one has ended. The store through which they meet is
torchrun's own and outlives them, and so do the addresses in it: one that starts early would read where a killed process
used to listen, and end with `Connection refused` (github.com/pytorch/pytorch/issues/167288). No variable that torchrun
sets tells one start from the next on all machines, so the processes agree on a name for theirs, and meet under it.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

from atp.ground import ranks

_PATIENCE = timedelta(minutes=30)  # what torch itself has for processes that are late
_POLL_SECONDS = 0.01
_CALLER, _ANSWER, _ARRIVED = "atp/caller/", "atp/answer/", "atp/arrived/"


def meeting() -> dict[str, Any]:
    """How `torch.distributed.init_process_group` must be called here; nothing where torch's own way is good.

    All processes of a run must call it. Raises `DistStoreError` if some do not come.
    """
    if ranks.count() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return {}
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE)
    return {
        "store": of_this_start(store, ranks.rank(), ranks.count()), "rank": ranks.rank(), "world_size": ranks.count()
    }  # fmt: skip


def of_this_start(store: Store, rank: int, count: int, patience: timedelta = _PATIENCE) -> Store:
    """A part of a store that only the processes of this start know, whatever earlier ones have left in it.

    The main process names it. Every other one calls under a name that nobody has used, and the main process answers all
    calls that it finds, also those of processes that are gone, until so many as there are have arrived.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        name, answered = mine, set[bytes]()

        def arrived() -> bool:
            for other in range(1, count):
                key = f"{_CALLER}{other}"
                if store.check([key]) and (caller := store.get(key)) not in answered:
                    answered.add(caller)
                    store.set(f"{_ANSWER}{caller.decode()}", name)
            return store.add(f"{_ARRIVED}{name}", 0) == count - 1

        _wait_until(arrived, patience)
    else:
        store.set(f"{_CALLER}{rank}", mine)
        answer = f"{_ANSWER}{mine}"
        _wait_until(lambda: store.check([answer]), patience)
        name = store.get(answer).decode()
        store.add(f"{_ARRIVED}{name}", 1)
    return PrefixStore(f"atp/start/{name}", store)


def _wait_until(done: Callable[[], bool], patience: timedelta) -> None:
    """Polls, so that Python can handle signals."""
    end = time.monotonic() + patience.total_seconds()
    while not done():
        if time.monotonic() > end:
            raise DistStoreError(f"not all processes of this run came within {patience}")
        time.sleep(_POLL_SECONDS)
