"""Work that jobs do in processes of their own; the test puts this folder on their path."""

import os
import signal
import time
from pathlib import Path

from atp.ground.errors import InputError, NotReached


def write(path, say):
    say(f"writing {path}")
    Path(path).write_text("here", encoding="utf-8")


def break_a_promise(say):
    raise NotReached("budget: missed")


def refuse(say):
    raise InputError("the data file changed")


def fail(say):
    raise ZeroDivisionError("division by zero")


def be_killed(say):
    os.kill(os.getpid(), signal.SIGKILL)


def wait(path, say):
    Path(path).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


def rank(folder, say):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = [os.environ[name] for name in names]
    (Path(folder) / values[0]).write_text(" ".join(values), encoding="utf-8")
