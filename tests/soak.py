"""A long run with many checkpoints: do memory, open files, threads, processes and the folder stay as they are?

    python tests/soak.py                  2,000 steps with a checkpoint every 10 and a validation score every 50
    python tests/soak.py --steps 400

The tiny model of the tests goes through open, search, settle and tune. Resident memory is read after each checkpoint;
that of the last third of a phase, against the middle third, may grow by 2 %. Exit status 1 if it grew by more, or if
anything else was left behind.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "atp")]

from tiny_inputs import tiny_config  # noqa: E402

from atp.config import ATPConfig  # noqa: E402
from atp.training.callbacks import Callback  # noqa: E402
from atp.training.trainer import ATPTrainer  # noqa: E402

GROWTH = 0.02
SHARES = {"open": 0.25, "search": 0.25, "settle": 0.15, "tune": 0.35}
LEFT = {"checkpoints", "metrics.jsonl"}


class Watch(Callback):
    """What the process holds after each checkpoint, by phase."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.children = set(self.process.children(recursive=True))  # not of the run
        self.memory: dict[str, list[int]] = {}
        self.files: list[int] = []
        self.threads: list[int] = []

    def on_checkpoint(self, loop, folder: Path) -> None:
        self.memory.setdefault(loop.phase, []).append(self.process.memory_info().rss)
        self.files.append(self.process.num_fds())
        self.threads.append(self.process.num_threads())

    def growth(self, phase: str) -> float:
        """Median of the last third of a phase over that of its middle third, less 1."""
        third = len(self.memory[phase]) // 3
        return statistics.median(self.memory[phase][-third:]) / statistics.median(self.memory[phase][third:-third]) - 1


def problems(watch: Watch, folder: Path, keep: int) -> list[str]:
    """What did not stay as it was."""
    found = [
        f"memory grew by {watch.growth(phase):.1%} in {phase}" for phase in watch.memory if watch.growth(phase) > GROWTH
    ]
    for name, counts in (("open files", watch.files), ("threads", watch.threads)):
        if counts[-1] > counts[len(counts) // 3]:
            found.append(f"{name} went from {counts[len(counts) // 3]} to {counts[-1]}")
    if children := set(watch.process.children(recursive=True)) - watch.children:
        found.append(f"{len(children)} processes are left")
    if {path.name for path in folder.iterdir()} != LEFT:
        found.append(f"the folder holds {sorted(path.name for path in folder.iterdir())}")
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name != "LATEST")
    if len(kept) != keep:
        found.append(f"checkpoints are {kept}, not {keep}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="at least 400")
    steps = parser.parse_args().steps
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "inputs").mkdir()
        values = tiny_config(root / "inputs").model_dump(mode="json") | {"output_dir": str(root / "run")}
        values["decisions"] |= {"source": "learned"}
        values["training"] |= {phase: round(share * steps) for phase, share in SHARES.items()} | {"save_every": 10}
        values["evaluation"] |= {"every": 50}
        config, watch, since = ATPConfig.parse(values), Watch(), time.perf_counter()
        trainer = ATPTrainer.from_config(config, callbacks=[watch])
        trainer.say = lambda line: None
        trainer.train()
        found = problems(watch, root / "run", config.training.keep_checkpoints)
    megabytes = {phase: statistics.median(taken) / 1e6 for phase, taken in watch.memory.items()}
    print(f"{trainer.step} steps, {len(watch.files)} checkpoints, {time.perf_counter() - since:.0f} s")
    for phase, middle in megabytes.items():
        print(f"{phase}: {middle:.0f} MB, {watch.growth(phase):+.2%} from its middle to its last third")
    print(f"open files {watch.files[0]} to {watch.files[-1]}, threads {watch.threads[0]} to {watch.threads[-1]}")
    print("\n".join(f"NOT FLAT: {line}" for line in found) or "all stayed as it was")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
