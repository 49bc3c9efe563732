"""Kills, signals and other faults in every phase of runs, and damaged checkpoints: does --resume end as if nothing was?

    python tests/chaos                      200 kills, signals and other faults, 500 damaged checkpoints
    python tests/chaos --kills 5 --faults 0.1 --damaged 50 --seed 3
    python tests/chaos --spread             kills and signals of two and four processes, weights in shards and whole
    python tests/chaos --record             also write the result to experiments/results/chaos.md

Exit status 1 if anything ended otherwise than promised.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import random
import re
import shutil
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from chaos_command import ROOT, Command, Watch, follow_all
from chaos_damage import damage, damaged_checkpoints
from chaos_faults import Fault, faults, skipped
from chaos_kills import Kill, kills, spread_kills, strike, table
from tiny_inputs import tiny_config
from tqdm import tqdm

from atp import run
from atp.evaluation import throughputs
from atp.inputs import promises

RECORD = ROOT / "experiments" / "results" / "chaos.md"


class Chaos:
    """Breaks runs and compares each, once it has been taken up, with an unbroken run of its command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.watch, self.lost = folder, Watch(), []
        follow_all(self.watch)
        (folder / "inputs").mkdir()
        self.config = folder / "config.yaml"
        config = tiny_config(folder / "inputs")
        config.training.keep_checkpoints, config.export.keep_adapter = 3, True
        config.training.open = 2
        self.config.write_text(config.dump())
        self._unbroken = {}

    def unbroken(self, processes: int, sharded: bool = False) -> tuple[dict[str, bytes], dict[str, float]]:
        """Results of an unbroken run and the seconds of its phases; it is run when it is first asked for."""
        kind = processes, sharded
        if kind not in self._unbroken:
            command = Command(self.config, self.folder / f"whole-{processes}-{sharded}", *kind)
            # The first is slower: files are read for the first time.
            assert command.finish(self.watch, resume=False) == 0, command.said[-2000:]
            shutil.rmtree(command.folder)
            seconds = self._time(command)
            self._unbroken[kind] = command.results, seconds
        return self._unbroken[kind]

    def _time(self, command: Command) -> dict[str, float]:
        """Seconds that an unbroken run spends in a phase at a time, and in all under ""."""
        begun = time.perf_counter()
        started, spent, phase, since = command.start(self.watch, resume=False), {}, "start", begun
        while started.running:
            now = time.perf_counter()
            if self.watch.phase != phase:
                spent[phase] = max(spent.get(phase, 0.0), now - since)
                phase, since = self.watch.phase, now
            time.sleep(2e-4)
        code = command.end(started)
        assert code == 0, f"an unbroken run ended with {code}: {command.said[-2000:]}"
        return spent | {"": time.perf_counter() - begun}

    def run(self, index: int, case: Kill | Fault) -> str:
        """Breaks a run, takes it up until it ends, and says how; what was not as promised goes into `lost`."""
        kind = case.processes, isinstance(case, Kill) and case.sharded
        whole, seconds = self.unbroken(*kind)
        command = Command(self.config, self.folder / f"case{index}", *kind)
        if isinstance(case, Kill):
            problems = strike(case, command, self.watch, seconds)
            outcome = f"met {', '.join(case.hits)}"
        else:
            problems = case.examine(command, self.watch)
            outcome = case.outcome
        if problems or command.resumable or not command.folder.exists():
            code = command.finish(self.watch, resume=command.resumable)
        else:  # ended before the run's first file, with what the phase before it leaves
            shutil.rmtree(command.folder)
            code = command.finish(self.watch, resume=False)
        if code != 0:
            problems.append(f"--resume ended with {code}: {command.said[-500:]}")
        elif (ours := command.results) == whole:
            outcome += "; the same bytes"
        elif isinstance(case, Fault) and skipped(case, command):
            outcome += "; steps skipped and counted"
        else:
            problems.append(f"differs in {[name for name in whole if ours.get(name) != whole[name]]}")
        problems += [f"{path} is left over" for path in command.folder.rglob(".writing-*")]
        if problems:
            self.lost.append(case)
            return f"{outcome}; LOST: {'; '.join(problems)}"
        shutil.rmtree(command.folder)
        return outcome

    @property
    def checkpoints(self) -> Path:
        self.unbroken(1)
        return self.folder / "whole-1-False" / "checkpoints"

    def damaged(self, count: int, draw: random.Random) -> tuple[Counter, list[str]]:
        """Resumes the unbroken run from damaged checkpoints: (how often it ended how, what was not as promised)."""
        command, found, problems = Command(self.config, self.checkpoints.parent), Counter(), []
        root, kept = self.checkpoints, self.folder / "kept"
        shutil.copytree(root, kept)
        for _ in range(count):
            shutil.rmtree(root)
            shutil.copytree(kept, root)
            (command.folder / "summary.json").unlink(missing_ok=True)
            kinds = damage(root, draw)
            code = command.finish(self.watch, resume=True)
            if code == 0 and command.results == self.unbroken(1)[0]:
                found["ended with the same bytes"] += 1
            elif code == 2 and not command.unlike(code):
                found["ended in one sentence"] += 1
            else:
                problems.append(f"{', '.join(kinds)}: ended with {code}: {command.said[-500:]}")
        return found, problems


def totals(cases: list[Kill | Fault], lost: list[Kill | Fault]) -> str:
    """Tried, survived and lost of each kind, as Markdown."""
    kinds = {}
    for case in cases:
        kind = case.kind if isinstance(case, Fault) else "SIGKILL" if case.signal == "SIGKILL" else "other signals"
        row = kinds.setdefault(kind, [0, 0, 0])
        row[case.processes > 1] += 1
        row[2] += case in lost
    kinds["all"] = [sum(column) for column in zip(*kinds.values(), strict=True)]
    lines = ["| fault | tried in one process | in several | survived | lost |", "|---|--:|--:|--:|--:|"]
    lines += [f"| {kind} | {a} | {b} | {a + b - lost} | {lost} |" for kind, (a, b, lost) in kinds.items()]
    return "\n".join(lines)


def damages(chaos: Chaos, count: int, draw: random.Random) -> tuple[str, list[str]]:
    """Damaged checkpoints, and whole runs resumed from some: (what came out, what was not as promised)."""
    damaged = damaged_checkpoints(chaos.checkpoints, count, draw)
    ends, problems = chaos.damaged(count // 40, draw)
    ended = ", ".join(f"{number} {name}" for name, number in ends.items())
    text = f"{damaged.text}\n\n{count // 40} whole runs resumed from such checkpoints: {ended}.\n"
    return text, damaged.problems + problems


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=90)
    parser.add_argument("--faults", type=float, default=1.0, help="share of the other faults")
    parser.add_argument("--spread", action="store_true", help="kills and signals of several processes instead")
    parser.add_argument("--damaged", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help=f"also write the result to {RECORD.relative_to(ROOT)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    promises.BUDGET_TOLERANCE = 0.02  # one channel of the tiny model is more than the tolerance
    run.throughputs = partial(throughputs, prompt_tokens=16, new_tokens=2, repeats=1)
    for late in ("matplotlib.figure", "matplotlib.backends.backend_svg", "accelerate.utils"):
        importlib.import_module(late)  # once, and not in every child
    tqdm.set_lock(threading.RLock())  # its own holds between processes, and a child that ends with it stops all others
    gc.freeze()  # nor need each child look for garbage in what it was forked with
    atexit.register(gc.unfreeze)  # nanobind takes what the interpreter does not collect at its end for leaks
    draw, started = random.Random(options.seed), time.perf_counter()
    with TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder))
        killed = spread_kills(draw) if options.spread else kills(options.kills, draw)
        cases = killed if options.spread else [*killed, *faults(options.faults, draw)]
        for index, case in enumerate(cases):
            print(f"{index + 1:3} {case.name:50} {chaos.run(index, case)}")
        damaged, problems = "", []
        if options.damaged and not options.spread:
            damaged, problems = damages(chaos, options.damaged, draw)
    minutes = (time.perf_counter() - started) / 60
    text = (
        f"`python tests/chaos {' '.join(sys.argv[1:])}`, {time.strftime('%d %B %Y')}, "
        f"torch {torch.__version__.split('+')[0]}, {os.cpu_count()} cores, {minutes:.1f} minutes.\n\n"
        f"{totals(cases, chaos.lost)}\n\nWhere kills and signals met a run:\n\n{table(killed)}\n\n{damaged}"
    )
    print("\n" + text)
    if options.record:
        RECORD.write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")
    return 1 if chaos.lost or problems else 0


if __name__ == "__main__":
    sys.exit(main())
