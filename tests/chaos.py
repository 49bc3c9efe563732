"""Kills and signals in every phase of runs, and damaged checkpoints: does --resume end as if nothing had happened?

    python tests/chaos.py                      40 kills and signals, 500 damaged checkpoints, in a quarter of an hour
    python tests/chaos.py --kills 5 --damaged 50 --seed 3
    python tests/chaos.py --record             also put the result into docs/reliability.md

Each command is a process of its own: forked, because importing torch takes longer than the whole tiny run. It tells its
phase through shared memory, so that a kill can wait for one. Exit status 1 if anything ended otherwise than promised.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import mmap
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "atp")]

import torch  # noqa: E402
from chaos_damage import damage, damaged_checkpoints  # noqa: E402
from tiny_command import results  # noqa: E402
from tiny_inputs import tiny_config  # noqa: E402

from atp import cli, run  # noqa: E402
from atp.baselines.tuner import LoraTuner  # noqa: E402
from atp.compare import Comparison, baseline_run  # noqa: E402
from atp.evaluation import throughput  # noqa: E402
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
COMPARE_PHASES = ("choose", "tune", "export", "scoring final")
_NAMES = (*PHASES, "choose")
DOCS = ROOT / "docs" / "reliability.md"
_MARK = "<!-- what tests/chaos.py measured -->\n"


class Watch:
    """The phase that the process under watch is in: one byte of shared memory."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)

    @property
    def phase(self) -> str:
        return _NAMES[self._memory[0]]

    @contextmanager
    def inside(self, phase: str):
        outer = self._memory[0]
        self._memory[0] = _NAMES.index(phase)
        try:
            yield
        finally:
            self._memory[0] = outer

    def reset(self) -> None:
        self._memory[0] = 0

    def follow(self, where, name, phase) -> None:
        """Names the phase while a function runs. phase: a name, or a function of the call's arguments."""
        function = getattr(where, name)

        def followed(*arguments, **options):
            with self.inside(phase if isinstance(phase, str) else phase(*arguments)):
                return function(*arguments, **options)

        setattr(where, name, followed)


def follow_all(watch: Watch) -> None:
    watch.follow(Run, "execute", "between phases")
    watch.follow(Comparison, "execute", "between phases")
    watch.follow(Run, "_prepare", "loading")
    watch.follow(Run, "_score_once", lambda run, name, *_: f"scoring {name.replace('_', ' ')}")
    watch.follow(Run, "_tune_dense", "dense baseline")
    watch.follow(LoraTuner, "train", lambda tuner, *_: "tune" if tuner.name == "tune" else "dense baseline")
    watch.follow(pruning, "fisher_saliency", "saliency")
    watch.follow(ATPTrainer, "run", lambda self, phase, *_: phase)
    watch.follow(Pruning, "refit", "refit")
    watch.follow(ATPTrainer, "_cut", "cut")
    watch.follow(ATPTrainer, "export", "export")
    watch.follow(checkpoints, "save", "checkpoint")
    watch.follow(baseline_run, "export_model", "export")
    watch.follow(baseline_run.BaselineRun, "_choose", "choose")
    watch.follow(hf, "certify_export", "certificate")
    watch.follow(run, "write_report", "report")


@dataclass
class Command:
    """`atp train` or `atp compare` on the tiny model, into a folder."""

    config: Path
    folder: Path
    compare: bool = False

    def start(self, watch: Watch, *, resume: bool) -> int:
        """Forks the command and returns the id of its process."""
        watch.reset()
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            for name in SIGNALS[1:]:
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with open(self.folder.with_suffix(".log"), "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            options = ["--methods", "random", "--out", str(self.folder)] if self.compare else []
            override = [] if self.compare else [f"output_dir={self.folder}"]
            command = "compare" if self.compare else "train"
            sys.argv = ["atp", command, str(self.config), *override, *options, *["--resume"] * resume]
            cli.main()
        except SystemExit as done:
            code = done.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)

    def finish(self, watch: Watch, *, resume: bool) -> int:
        """Runs the command to its end and returns its exit code."""
        return ended(self.start(watch, resume=resume))

    @property
    def said(self) -> str:
        return self.folder.with_suffix(".log").read_text()

    @property
    def results(self) -> dict[str, bytes]:
        return results(self.folder / "random-seed0" if self.compare else self.folder)


def ended(child: int) -> int:
    """Exit code of a process, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass
class Case:
    """One kill: in a phase at a share of its usual length, or at a share of the whole run where phase is empty."""

    phase: str
    signal: str
    share: float
    compare: bool = False
    hits: list[str] = field(default_factory=list)
    problem: str = ""


def cases(count: int, draw: random.Random) -> list[Case]:
    """A kill and a signal in every phase of a run, some in a comparison, and the rest at random times."""
    found = []
    signals = [name for name in SIGNALS if name != "SIGKILL"]
    for index, phase in enumerate(PHASES[2:]):
        found += [Case(phase, name, draw.random()) for name in ("SIGKILL", signals[index % 3])]
    found += [Case(p, SIGNALS[i], draw.random(), compare=True) for i, p in enumerate(COMPARE_PHASES)]
    found += [Case("", SIGNALS[i % 4], draw.random()) for i in range(max(6, count - len(found)))]
    if count < len(found):
        found = draw.sample(found, count)
    return found


class Chaos:
    """Runs cases beside an unbroken run of each command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.watch = folder, Watch()
        follow_all(self.watch)
        (folder / "inputs").mkdir()
        self.config = folder / "config.yaml"
        config = tiny_config(folder / "inputs")
        config.training.keep_checkpoints, config.export.keep_adapter = 3, True
        config.training.open = 2  # and so a teacher, which a resumed run must make again
        self.config.write_text(config.dump())
        self.whole, self.seconds = {}, {}
        for compare in (False, True):
            command = Command(self.config, folder / f"whole-{compare}", compare)
            command.finish(self.watch, resume=False)  # the first is slower: files are read for the first time
            shutil.rmtree(command.folder)
            self.seconds[compare] = self._time(command)
            self.whole[compare] = command.results

    def _time(self, command: Command) -> dict[str, float]:
        """Seconds that an unbroken run spends in a phase at a time, and in all under ""."""
        started = time.perf_counter()
        child, spent, phase, since = command.start(self.watch, resume=False), {}, "start", started
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            now = time.perf_counter()
            if self.watch.phase != phase:
                spent[phase] = max(spent.get(phase, 0.0), now - since)
                phase, since = self.watch.phase, now
            time.sleep(2e-4)
        code = ended(child)
        assert code == 0, f"an unbroken run ended with {code}: {command.said[-2000:]}"
        return spent | {"": time.perf_counter() - started}

    def run(self, index: int, case: Case) -> None:
        """Breaks a run off, takes it up until it ends, and says in the case what was not as promised."""
        command = Command(self.config, self.folder / f"case{index}", case.compare)
        code = self._break(command, case)
        for _ in range(5):
            if case.hits != ["after the end"]:
                break
            shutil.rmtree(command.folder)  # too late: this run was quicker than the one whose times were taken
            case.hits.clear()
            case.share /= 2
            code = self._break(command, case)
        problems = self._after(case, code, command)
        # Killed once more on the way, where the first kill came at a random time.
        if not case.phase and code != 0 and self._resumable(command):
            child = command.start(self.watch, resume=True)
            self._hit(child, Case("", "SIGKILL", case.share / 2, hits=case.hits))
            ended(child)
        resume = self._resumable(command)
        code = command.finish(self.watch, resume=resume)
        if code != 0:
            problems.append(f"--resume ended with {code}: {command.said[-500:]}")
        elif command.results != self.whole[case.compare]:
            whole, ours = self.whole[case.compare], command.results
            problems.append(f"differs in {[name for name in whole if ours.get(name) != whole[name]]}")
        problems += [f"{path} is left over" for path in command.folder.rglob(".writing-*")]
        case.problem = "; ".join(problems)
        if not problems:
            shutil.rmtree(command.folder)

    def damaged(self, count: int, draw: random.Random) -> tuple[Counter, list[str]]:
        """Resumes the unbroken run from damaged checkpoints: (how often it ended how, what was not as promised)."""
        command, found, problems = Command(self.config, self.folder / "whole-False"), Counter(), []
        root, kept = command.folder / "checkpoints", self.folder / "kept"
        shutil.copytree(root, kept)
        for _ in range(count):
            shutil.rmtree(root)
            shutil.copytree(kept, root)
            (command.folder / "summary.json").unlink(missing_ok=True)
            kinds = damage(root, draw)
            code = command.finish(self.watch, resume=True)
            if code == 0 and command.results == self.whole[False]:
                found["ended with the same bytes"] += 1
            elif code == 2 and command.said.count("error: ") == 1 and "Traceback" not in command.said:
                found["ended in one sentence"] += 1
            else:
                problems.append(f"{', '.join(kinds)}: ended with {code}: {command.said[-500:]}")
        return found, problems

    def _break(self, command: Command, case: Case) -> int:
        """Starts the command, hits it as the case says, and returns its exit code."""
        child = command.start(self.watch, resume=False)
        self._hit(child, case)
        return ended(child)

    def _hit(self, child: int, case: Case) -> None:
        """Sends the signal once its time has come; notes the phase it met, or that the run had ended by then."""
        seconds = self.seconds[case.compare]
        wait, begun = case.share * seconds.get(case.phase, 0.01), None if case.phase else time.perf_counter()
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if begun is None and self.watch.phase == case.phase:
                begun = time.perf_counter()
            if begun is not None and time.perf_counter() - begun >= wait:
                case.hits.append(self.watch.phase)
                os.kill(child, getattr(signal, case.signal))
                return
            time.sleep(2e-4)
        case.hits.append("after the end")

    def _after(self, case: Case, code: int, command: Command) -> list[str]:
        number = getattr(signal, case.signal)
        if case.signal == "SIGKILL":
            return []
        if code == 0 or case.hits == ["start"]:  # the signal came when all was done, or before the command began
            return []
        said = command.said
        problems = [] if code == 128 + number else [f"{case.signal} ended it with {code}: {said[-500:]}"]
        if said.count(f"error: interrupted by signal {int(number)}: ") != 1 or "Traceback" in said:
            problems.append(f"no one message: {said[-500:]}")
        return problems

    def _resumable(self, command: Command) -> bool:
        """Before the first file there is nothing to resume, and the command is given again without --resume."""
        return (command.folder / ("comparison.yaml" if command.compare else "config.yaml")).is_file()


def table(found: list[Case]) -> str:
    """What was hit where, one row per phase, as Markdown."""
    met: dict[str, Counter] = {}
    for case in found:
        met.setdefault(("compare: " if case.compare else "") + case.hits[0], Counter())[case.signal] += 1
        for phase in case.hits[1:]:
            met.setdefault(phase, Counter())["SIGKILL"] += 1
    lines = [f"| phase met | {' | '.join(SIGNALS)} |", "|---|" + "--:|" * len(SIGNALS)]
    order = [*_NAMES, *(f"compare: {name}" for name in _NAMES), "after the end"]
    for phase in sorted(met, key=order.index):
        lines.append(f"| {phase} | {' | '.join(str(met[phase][name] or '') for name in SIGNALS)} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the cases and prints, or records, what came out; returns the exit status."""
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--damaged", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="also write the result to docs/reliability.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run.BUDGET_TOLERANCE = 0.02  # one channel of the tiny model is more than the tolerance
    run.throughput = partial(throughput, prompt_tokens=16, new_tokens=2, repeats=1)
    for late in ("matplotlib.figure", "matplotlib.backends.backend_svg", "accelerate.utils"):
        importlib.import_module(late)  # once, and not in every child
    gc.freeze()  # nor need each child look for garbage in what it was forked with
    atexit.register(gc.unfreeze)  # nanobind takes what the interpreter does not collect at its end for leaks
    draw, started = random.Random(options.seed), time.perf_counter()
    with TemporaryDirectory() as folder:
        chaos, found = Chaos(Path(folder)), cases(options.kills, draw)
        for index, case in enumerate(found):
            chaos.run(index, case)
            where = case.phase or f"{case.share:.0%} of the run"
            kind = "compare" if case.compare else "train"
            met, outcome = ", ".join(case.hits), case.problem or "the same bytes"
            print(f"{index + 1:3} {kind:8} {case.signal:8} at {where:20} met {met:28} {outcome}")
        damaged = damaged_checkpoints(Path(folder) / "whole-False" / "checkpoints", options.damaged, draw)
        ends, problems = chaos.damaged(options.damaged // 40, draw)
    damaged.problems += problems
    bad = [case for case in found if case.problem]
    minutes = (time.perf_counter() - started) / 60
    text = (
        f"`python tests/chaos.py --kills {options.kills} --damaged {options.damaged} --seed {options.seed}`, torch "
        f"{torch.__version__.split('+')[0]}, {os.cpu_count()} cores, {minutes:.1f} minutes.\n\n"
        f"{len(found) - len(bad)} of {len(found)} broken runs ended with the bytes of an unbroken one.\n\n"
        f"{table(found)}\n\n{damaged.text}\n\n"
        f"{options.damaged // 40} whole runs resumed from such checkpoints: "
        f"{', '.join(f'{count} {name}' for name, count in ends.items())}.\n"
    )
    print("\n" + text)
    if options.record:
        head = DOCS.read_text(encoding="utf-8").partition(_MARK)[0]
        DOCS.write_text(head + _MARK + re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")
    return 1 if bad or damaged.problems else 0


if __name__ == "__main__":
    sys.exit(main())
