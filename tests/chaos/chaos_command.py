"""Runs of the tiny model as processes of their own, whose phase the harness sees, and what they leave.

Each process is forked, because importing torch takes longer than the whole run. It tells its phase through shared
memory, so that whatever is to befall it can wait for one.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "atp")]

from tiny_command import results  # noqa: E402

from atp import run  # noqa: E402
from atp.baselines.tuner import LoraTuner  # noqa: E402
from atp.cli import cli  # noqa: E402
from atp.export import hf  # noqa: E402
from atp.run import Run  # noqa: E402
from atp.training import checkpoint as checkpoints  # noqa: E402
from atp.training import pruning  # noqa: E402
from atp.training.pruning import Pruning  # noqa: E402
from atp.training.trainer import ATPTrainer  # noqa: E402

SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
PHASES = (
    "start", "between phases", "loading", "scoring original", "dense baseline", "scoring tuned dense",
    "open", "saliency", "search", "settle", "refit", "cut", "tune", "checkpoint", "export", "certificate",
    "scoring final", "report",
)  # fmt: skip
CODES = (0, 1, 2, 3, *(128 + getattr(signal, name) for name in SIGNALS[1:]))
PATIENCE = 20.0  # seconds that one process of a run may take to notice that the other has gone
LONGEST = 180.0  # seconds of a whole run, of which an unbroken one takes a few
_PIPE = 1 << 20


class Watch:
    """The phase that the process under watch is in: one byte of shared memory.

    strikes: functions that the process calls when it enters a phase, once each.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)
        self.strikes: dict[str, Callable[[], None]] = {}

    @property
    def phase(self) -> str:
        return PHASES[self._memory[0]]

    @contextmanager
    def inside(self, phase: str):
        outer = self._memory[0]
        self._memory[0] = PHASES.index(phase)
        if phase in self.strikes:
            self.strikes.pop(phase)()
        try:
            yield
        finally:
            self._memory[0] = outer

    def reset(self) -> None:
        self._memory[0] = 0

    def leave(self) -> None:
        """Tells nobody any more: for processes other than the first of a run."""
        self._memory = mmap.mmap(-1, 1)

    def follow(self, where, name, phase) -> None:
        function = getattr(where, name)

        def followed(*arguments, **options):
            with self.inside(phase if isinstance(phase, str) else phase(*arguments)):
                return function(*arguments, **options)

        setattr(where, name, followed)


def follow_all(watch: Watch) -> None:
    watch.follow(Run, "execute", "between phases")
    watch.follow(Run, "_prepare", "loading")
    watch.follow(Run, "_score_once", lambda run, name, *_: f"scoring {name.replace('_', ' ')}")
    watch.follow(Run, "_tune_dense", "dense baseline")
    watch.follow(LoraTuner, "train", "dense baseline")
    watch.follow(pruning, "fisher_saliency", "saliency")
    watch.follow(ATPTrainer, "run", lambda self, phase, *_: phase)
    watch.follow(Pruning, "refit", "refit")
    watch.follow(ATPTrainer, "_cut", "cut")
    watch.follow(ATPTrainer, "export", "export")
    watch.follow(checkpoints, "save", "checkpoint")
    watch.follow(hf, "certify_export", "certificate")
    watch.follow(run, "write_report", "report")


@dataclass
class Started:
    """The processes of a command under way, the main one first, and the ends of the pipes that they write into."""

    children: list[int]
    pipes: list[int]
    codes: dict[int, int] = field(default_factory=dict)
    stuck: str = ""  # why a process had to be ended

    @property
    def running(self) -> bool:
        """Whether all of its processes still run."""
        for child in self.children:
            if child not in self.codes and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self.codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return not self.codes

    def send(self, name: str, victim: int = 0) -> None:
        os.kill(self.children[victim], getattr(signal, name))

    def send_all(self, name: str) -> None:
        """As torchrun does it: a signal to it goes to all of its workers."""
        for victim, child in enumerate(self.children):
            if child not in self.codes:
                self.send(name, victim)

    def wait(self) -> list[int]:
        """The exit codes of all processes, negative where a signal ended one."""
        begun, alone = time.perf_counter(), None
        while len(self.codes) < len(self.children):
            time.sleep(1e-3)
            now = time.perf_counter()
            if not self.running and alone is None:
                alone = now
            if alone is not None and now - alone > PATIENCE and len(self.codes) < len(self.children):
                self.stuck = self.stuck or "a process waited for one that had gone"
            elif now - begun > LONGEST:
                self.stuck = self.stuck or "a process did not end"
            if self.stuck:
                self.send_all("SIGKILL")
        return [self.codes[child] for child in self.children]


@dataclass
class Command:
    """`atp train` on the tiny model, into a folder, in one process or in several."""

    config: Path
    folder: Path
    processes: int = 1
    sharded: bool = False
    said: str = ""

    def start(
        self, watch: Watch, *, resume: bool, strikes: dict[str, Callable[[], None]] | None = None, victim: int = 0
    ) -> Started:
        """Forks the command. strikes: what befalls the process `victim` at the start of which phase."""
        watch.reset()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = Started([], [])
        for rank in range(self.processes):
            ours, theirs = os.pipe()
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, _PIPE)  # nobody reads before the end
            child = os.fork()
            if not child:
                watch.strikes = dict(strikes or {}) if rank == victim else {}
                if rank:
                    watch.leave()
                self._become(rank, port, theirs, resume)
            os.close(theirs)
            started.children.append(child)
            started.pipes.append(ours)
        return started

    def _become(self, rank: int, port: int, output: int, resume: bool) -> None:
        """Runs the command in this process, and ends it."""
        code = 70
        try:
            for name in SIGNALS[1:]:
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if self.processes > 1:
                os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{self.processes}",
                               "LOCAL_WORLD_SIZE": f"{self.processes}", "MASTER_ADDR": "127.0.0.1",
                               "MASTER_PORT": f"{port}"}  # fmt: skip
            where = [f"output_dir={self.folder}"]
            if self.sharded:  # the dense baseline is a model of its own, which is refused in shards
                where += ["training.sharding=fsdp", "evaluation.dense_baseline=false"]
            sys.argv = ["atp", "train", str(self.config), *where, *["--resume"] * resume]
            cli.main()
        except SystemExit as done:
            code = done.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)

    def end(self, started: Started) -> int:
        """Waits for all processes; the first exit code that is not 0, with what they said in `said`."""
        codes = started.wait()
        said = []
        for pipe in started.pipes:
            with os.fdopen(pipe, "rb") as file:
                said.append(file.read().decode(errors="replace"))
        self.said = "".join(said)
        return next((code for code in codes if code), 0)

    def finish(self, watch: Watch, *, resume: bool) -> int:
        return self.end(self.start(watch, resume=resume))

    @property
    def results(self) -> dict[str, bytes]:
        return results(self.folder)

    @property
    def resumable(self) -> bool:
        """Before the first file there is nothing to resume, and the command is given again without --resume."""
        return (self.folder / "config.yaml").is_file()

    @property
    def sentences(self) -> list[str]:
        return re.findall(r"^(?:process \d+: )?error: (.*)$", self.said, re.MULTILINE)

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))

    def unlike(self, code: int) -> list[str]:
        """What is wrong with how the command ended, if it did not end well: a sentence, and no traceback."""
        if code == 0:
            return []
        problems = [] if code in CODES else [f"ended with {code}"]
        if not 1 <= len(self.sentences) <= self.processes or "Traceback" in self.said:
            problems.append("no one sentence")
        return [f"{problem}: {self.said[-700:]}" for problem in problems]
