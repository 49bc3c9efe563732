"""One config again and again beside busy loops, and broken off early on a processor that changes: is all the same?"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from chaos_command import Command, Watch

PROCESSES = (1, 2)
BROKEN_OFF = {"before the first step": "open", "in the export": "export"}  # -> the phase that a kill ends as it begins
_LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(1000000): pass"


def under_load(watch: Watch, config: Path, folder: Path, runs: int) -> tuple[str, bool]:
    """(what came out, whether each number of processes came to one outcome), as many busy loops as cores beside.

    `training.precision` is auto. After `runs` whole runs some are killed, and resumed where torch says the opposite of
    what the processor can do. An outcome is the precision, the bytes that a run is for, and all scores.
    """
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["training"]["precision"] = "auto"
    settings["evaluation"]["dense_baseline"] = False  # whose steps would be the first
    config = folder / "auto.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    lines, same = [], True
    with busy(os.cpu_count() or 1):
        for processes in PROCESSES:
            cases = [(f"whole run {index + 1}", None) for index in range(runs)] + list(BROKEN_OFF.items())
            found = []
            for index, (name, phase) in enumerate(cases):
                command = Command(config, folder / f"load-{processes}-{index}", processes=processes)
                found.append(_outcome(command, watch, phase))
                print(f"{processes} process(es), {name:24} {', '.join(found[-1])}")
            same = same and len(set(found)) == 1
            ended = ", ".join(f"{count} with {' '.join(one)}" for one, count in Counter(found).most_common())
            broken = f"{runs} whole and {len(BROKEN_OFF)} broken off {' and '.join(BROKEN_OFF)}"
            lines.append(f"* {processes} process(es), {broken}: {ended}")
    return "\n".join(lines), same


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many busy loops, which end with the block, or with this process however it ends."""
    loops = [subprocess.Popen([sys.executable, "-c", _LOOP, str(os.getpid())]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _outcome(command: Command, watch: Watch, phase: str | None) -> tuple[str, str, str]:
    if phase is not None:
        code = command.end(command.start(watch, resume=False, strikes={phase: _die}))
        assert code == -signal.SIGKILL, command.said[-2000:]
        with _opposite():
            code = command.finish(watch, resume=True)
    else:
        code = command.finish(watch, resume=False)
    assert code == 0, command.said[-2000:]
    scores = json.loads((command.folder / "evaluation.json").read_text(encoding="utf-8"))
    told = {name: [found["perplexity"], found["tasks"]] for name, found in scores.items() if "perplexity" in found}
    saved = yaml.safe_load((command.folder / "config.yaml").read_text(encoding="utf-8"))
    return (
        saved["training"]["precision"],
        f"bytes {_digest(repr(sorted(command.results.items())))}",
        f"scores {_digest(json.dumps(told))}",
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _opposite() -> Iterator[None]:
    """Torch says that the processor has what it lacks, and the other way round."""
    ask: Callable = torch.cpu.get_capabilities
    has = ask().get("avx512_bf16", False)
    torch.cpu.get_capabilities = lambda: {"avx512_bf16": not has}
    try:
        yield
    finally:
        torch.cpu.get_capabilities = ask
