"""Runs of the tiny model in one, two and four processes that gloo joins, each part in another number of them.

    python tests/atp/training/shared_runs.py FOLDER

Processes are forked from this one, which has imported everything: that saves most of the time.
"""

import os
import socket
import sys
import traceback
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from tiny_callbacks import StopAt  # noqa: E402
from tiny_run import CUT, SEARCH, make, windows  # noqa: E402

from atp.ground.errors import Interrupted  # noqa: E402
from atp.processes import processes  # noqa: E402

BATCHES = 4  # in each step, of all processes; and as many windows in each decision step
SHORT = {"open": 2, "search": 0, "settle": 0, "tune": 1}
# The settings of decisions, training and model that differ. The refits hold a window out, and none.
RUNS = {
    "learned": ({"source": "learned", "refit_windows": 24}, {}, {}),
    "running": ({"source": "running", "refit_windows": 0}, {**SHORT, "search": 2, "settle": 1}, {}),
    "untied": (
        {"source": "tuned", "space": "kv_group", "refit_windows": 5, "rounds": 2},
        SHORT,
        {"tie_word_embeddings": False},
    ),
    "embeddings": ({"source": "tuned", "refit_windows": 5}, SHORT | {"embeddings": True}, {}),
    "full": (
        {"source": "tuned", "refit_windows": 5},
        SHORT | {"tune": 3, "embeddings": True, "after_cut": "full", "full_lr": 1e-3},
        {},
    ),
}
UNSHARDED = ("embeddings", "full")  # fmt: skip
# Processes of each part of a run, and the step where it is broken off: before the refit, after it, after the cut.
PARTS = {
    "whole": [(2, SEARCH - 1), (4, CUT + 1), (1, None)],
    "fsdp": [(2, SEARCH + 1), (4, CUT + 1), (1, None)],
}


def train(folder, name, started_in, *, stop=None, resume=False, sharding=None):
    """One part of a run, in this process; started_in: how many processes its first part had."""
    decisions, training, sizes = RUNS[name]
    callbacks = [StopAt(stop)] if stop is not None and processes.is_main() else []
    trainer = make(
        folder, callbacks=callbacks, lora={"dropout": 0.0}, sizes=sizes,
        decisions={"batch_size": BATCHES // started_in, "saliency_windows": 5, **decisions},
        training={"batch_size": 1, "gradient_accumulation": BATCHES // started_in, "save_every": 100,
                  "sharding": sharding, **training},
    )  # fmt: skip
    trainer.pruning.calibration = windows(24, seed=2)  # enough for batches of three in the first refit
    try:
        trainer.train(resume=resume)
    except Interrupted:
        return
    trainer.export(folder)


def fork(count, work):
    """Runs `work` in so many processes and ends with theirs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            if count > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )  # fmt: skip
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(f"{work} failed in {count} processes")


def main(root):
    """Every run in one process, in parts with whole weights, and sharded."""
    torch.set_num_threads(1)
    for name in RUNS:
        fork(1, lambda name=name: train(root / f"{name}-one", name, 1))
        if name in UNSHARDED:
            fork(2, lambda name=name: train(root / f"{name}-two", name, 2))
        elif name != "learned":
            fork(2, lambda name=name: train(root / f"{name}-sharded", name, 2, sharding="fsdp"))
    for kind, parts in PARTS.items():
        for number, (count, stop) in enumerate(parts):
            options = {"stop": stop, "resume": number > 0, "sharding": None if kind == "whole" else kind}
            fork(count, lambda kind=kind, options=options: train(root / f"parts-{kind}", "learned", 2, **options))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
