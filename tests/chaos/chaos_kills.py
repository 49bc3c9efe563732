"""Kills and signals, in every phase and at random times, to one process of a run or to all."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field

from chaos_command import PHASES, SIGNALS, Command, Started, Watch, signal

TOO_LATE = "after the end"
_SHARDS = ", in shards"
_SEVERAL = {2: "two processes", 4: "four processes"}


@dataclass
class Kill:
    """One kill: in a phase at a share of its usual length, or at a share of the whole run where phase is empty."""

    phase: str
    signal: str
    share: float
    processes: int = 1
    sharded: bool = False
    victim: int = 0
    hits: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        where = self.phase or f"{self.share:.0%} of the run"
        who = f"process {self.victim}" if self.signal == "SIGKILL" else "all"
        several = f", {who} of {self.processes}{_SHARDS * self.sharded}" if self.processes > 1 else ""
        return f"{self.signal} at {where}{several}"


def kills(count: int, draw: random.Random) -> list[Kill]:
    """A kill and a signal in every phase, in one process and in two, and the rest anywhere."""
    found = []
    signals = [name for name in SIGNALS if name != "SIGKILL"]
    for index, phase in enumerate(PHASES[2:]):
        found += [Kill(phase, name, draw.random()) for name in ("SIGKILL", signals[index % 3])]
        found += [Kill(phase, "SIGKILL", draw.random(), processes=2, victim=index % 2)]
        found += [Kill(phase, signals[(index + 1) % 3], draw.random(), processes=2)]
    found += [Kill("", SIGNALS[i % 4], draw.random()) for i in range(max(8, count - len(found)))]
    return found if count >= len(found) else draw.sample(found, count)


def spread_kills(draw: random.Random) -> list[Kill]:
    """In every phase a kill and a signal of two processes with weights in shards and of four, sharded or whole."""
    found = []
    signals = [name for name in SIGNALS if name != "SIGKILL"]
    for index, phase in enumerate(phase for phase in PHASES[2:] if "dense" not in phase):  # in shards there is none
        sharded = {"processes": 2, "sharded": True}
        found += [Kill(phase, "SIGKILL", draw.random(), victim=index % 2, **sharded)]
        found += [Kill(phase, signals[index % 3], draw.random(), **sharded)]
        four = {"processes": 4, "sharded": index % 2 == 0}
        found += [Kill(phase, "SIGKILL", draw.random(), victim=index % 4, **four)]
        found += [Kill(phase, signals[(index + 1) % 3], draw.random(), **four | {"sharded": index % 2 == 1})]
    return found


def strike(kill: Kill, command: Command, watch: Watch, seconds: dict[str, float]) -> list[str]:
    """Breaks a run off and says what of its end was not as promised. seconds: how long each phase usually takes."""
    for _ in range(6):
        started = command.start(watch, resume=False)
        hit(started, kill, watch, seconds)
        code = command.end(started)
        if kill.hits != [TOO_LATE]:
            break
        shutil.rmtree(command.folder)  # this run was quicker than the one whose times were taken
        kill.hits.clear()
        kill.share /= 2
    problems = _unlike(kill, code, command)
    # Killed once more on the way, where the first kill came at a random time.
    if not kill.phase and code != 0 and command.resumable:
        started = command.start(watch, resume=True)
        hit(started, Kill("", "SIGKILL", kill.share / 2, hits=kill.hits), watch, seconds)
        command.end(started)
    return problems


def hit(started: Started, kill: Kill, watch: Watch, seconds: dict[str, float]) -> None:
    """Sends the signal once its time has come; notes the phase it met, or that the run had ended by then."""
    wait, begun = kill.share * seconds.get(kill.phase, 0.01), None if kill.phase else time.perf_counter()
    while started.running:
        if begun is None and watch.phase == kill.phase:
            begun = time.perf_counter()
        if begun is not None and time.perf_counter() - begun >= wait:
            kill.hits.append(watch.phase)
            if kill.signal == "SIGKILL":
                started.send(kill.signal, kill.victim)
            else:
                started.send_all(kill.signal)
            return
        time.sleep(2e-4)
    kill.hits.append(TOO_LATE)


def _unlike(kill: Kill, code: int, command: Command) -> list[str]:
    """What was not as promised: after SIGKILL the others end by themselves, a signal ends all with one sentence."""
    # The signal may come when all is done, or before the command has begun.
    if code == 0 or kill.hits == ["start"]:
        return []
    if kill.signal == "SIGKILL":
        return ["a traceback: " + command.said[-700:]] if "Traceback" in command.said else []
    number = int(getattr(signal, kill.signal))
    problems = [] if code == 128 + number else [f"{kill.signal} ended it with {code}: {command.said[-500:]}"]
    if not all(sentence.startswith(f"interrupted by signal {number}: ") for sentence in command.sentences):
        problems.append(f"another sentence: {command.sentences}")
    return problems + command.unlike(code)


def _head(kill: Kill) -> str:
    return f"{_SEVERAL[kill.processes]}{_SHARDS * kill.sharded}: " if kill.processes > 1 else ""


def table(found: list[Kill]) -> str:
    """What was hit where, one row per phase, as Markdown."""
    met: dict[str, Counter] = {}
    for kill in found:
        met.setdefault(_head(kill) + kill.hits[0], Counter())[kill.signal] += 1
        for phase in kill.hits[1:]:
            met.setdefault(phase, Counter())["SIGKILL"] += 1
    lines = [f"| phase met | {' | '.join(SIGNALS)} |", "|---|" + "--:|" * len(SIGNALS)]
    heads = ("", *(f"{several}{shards}: " for several in _SEVERAL.values() for shards in ("", _SHARDS)))
    for phase in sorted(met, key=[head + name for head in heads for name in (*PHASES, TOO_LATE)].index):
        lines.append(f"| {phase} | {' | '.join(str(met[phase][name] or '') for name in SIGNALS)} |")
    return "\n".join(lines)
