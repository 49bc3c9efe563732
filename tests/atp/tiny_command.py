"""Whole runs on the tiny model, stopped where a test wants it, and what is compared of them."""

import json
import os
import signal
import time
from contextlib import contextmanager

import pytest

from atp.inputs import promises
from atp.run import Run

RESULTS = ("base", "adapter", "model", "decisions.json", "decisions.safetensors")


def start(config, folder, *, resume=False, say=lambda text: None, **overrides):
    """Runs `atp train` without the terminal, adapter and base kept. overrides: section={key: value}."""
    values = config.model_dump(mode="json") | {"output_dir": str(folder), "export": {"keep_adapter": True}}
    for section, keys in overrides.items():
        values[section] = values[section] | keys
    with pytest.MonkeyPatch.context() as patch:
        # One channel of the tiny model is more than the tolerance on the budget.
        patch.setattr(promises, "BUDGET_TOLERANCE", max(promises.BUDGET_TOLERANCE, 0.02))
        return Run(type(config).parse(values), resume=resume, command="atp train", say=say).execute()


def one_in_four(cases):
    """Names of cases that each take whole runs; all but every fourth are slow."""
    return [pytest.param(name, marks=pytest.mark.slow if place % 4 else ()) for place, name in enumerate(cases)]


def results(folder):
    """Path -> bytes of what a run is for. The adapter's config names the folder of its base, which is left out."""
    paths = [path for name in RESULTS for path in [folder / name, *(folder / name).rglob("*")] if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"") for path in paths}


def everything(folder):
    """Path -> (bytes, time of the last change) of all files but the lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def is_one_sentence(err):
    """Whether a command said on stderr what was wrong, and no more."""
    return err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err and len(err) < 1000


class Stop(BaseException):
    """What a kill is to the files: nothing after it is run."""


@contextmanager
def stopping_at(where, name, *, after=False, when=lambda *arguments, **options: True):
    """Stops whatever runs in the block before the function `name` of `where`, or after it."""
    function = getattr(where, name)

    def stop(*arguments, **options):
        if not when(*arguments, **options):
            return function(*arguments, **options)
        if after:
            function(*arguments, **options)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, stop)
        with pytest.raises(Stop):
            yield


@contextmanager
def another_process(inside):
    """Yields the id of a process that is inside a context manager, and kills it."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with inside:
            os.write(told, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
