"""What `atp plan` says of memory, beside the resident memory that a real run of the same config takes, on a CPU.

    python -m benchmarks.plan_memory examples/health-mini.yaml training.steps=6 output_dir=/tmp/run
    torchrun --nproc_per_node 2 -m benchmarks.plan_memory config.yaml training.sharding=fsdp  # of the main process

The run happens in a process of its own, and times few tokens where it measures speed, which takes longest.
Measured is Linux's VmHWM, reset between the parts of the run, less what is resident once all packages are imported.
Pages of libraries are left out of both, because a system that is short of memory takes them back. Measured memory holds
all that a plan leaves out, and what the allocator keeps of freed memory; with MALLOC_MMAP_THRESHOLD_=65536 in the
environment glibc keeps next to nothing.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from atp.config import ATPConfig
from atp.evaluation import throughputs
from atp.evaluation.scored_tasks import check_tasks
from atp.ground import heap, ranks
from atp.inputs.loading import load_data, load_shapes, load_tokenizer
from atp.inputs.precision import autocast_dtype
from atp.inputs.resolve import resolve
from atp.plan.job import Questions, Workload
from atp.plan.memory import memory_of
from atp.plan.shapes import ModelShapes
from atp.run import Run
from atp.training.loop import Loop
from atp.training.pruning import Pruning
from atp.training.trainer import ATPTrainer
from benchmarks.measure import reset_resident_peak, resident_peak_bytes
from benchmarks.run import MIB
from benchmarks.whole_run import apart

GIVE_BACK = heap.give_back

# What opens a part of a run, and the name that the plan has for it.
_PARTS = (
    (Pruning, "_refit", "refit"),
    (Pruning, "_saliency", "saliency"),
    (ATPTrainer, "_cut", "cut"),
    (ATPTrainer, "export", "export"),
    (Run, "_time", "speed"),
)


class Peaks:
    """The most resident memory of each part of a run, in bytes beyond what was resident at the start."""

    def __init__(self) -> None:
        self.start = _resident() - _of_libraries()
        self.bytes: dict[str, float] = {}
        self.part, self.fresh = "load", False
        reset_resident_peak()

    def enter(self, part: str) -> None:
        """Counts from here towards a part."""
        peak = resident_peak_bytes() - _of_libraries() - self.start
        self.bytes[self.part] = max(peak, self.bytes.get(self.part, 0))
        self.part, self.fresh = part, True
        reset_resident_peak()

    def give_back(self) -> None:
        """`heap.give_back`: where a part begins with it, what it gives back is not the part's."""
        GIVE_BACK()
        if self.fresh:
            self.fresh = False
            reset_resident_peak()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every part of a run inside the with block is watched."""
        with (
            patch.object(heap, "give_back", self.give_back),
            patch.object(Run, "_score_once", self._named(Run._score_once, self._scored)),
        ):
            with patch.object(Loop, "begin", self._named(Loop.begin, lambda loop, phase: phase, rest="")):
                patches = [patch.object(o, name, self._named(getattr(o, name), part)) for o, name, part in _PARTS]
                for change in patches:
                    change.start()
                try:
                    yield
                finally:
                    for change in patches:
                        change.stop()
        self.enter("end")

    def _scored(self, run: Run, name: str, *rest: Any) -> str:
        return "score" if name == "original" else "score again"

    def _named(self, function: Callable, part: str | Callable[..., str], rest: str = "between") -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            self.enter(part if isinstance(part, str) else part(*arguments))
            found = function(*arguments, **options)
            if rest:
                self.enter(rest)
            return found

        return call


def measured(config: ATPConfig) -> dict[str, float]:
    """Bytes at the peak of each part of a run, in this process."""
    torch.set_num_threads(1)
    peaks = Peaks()
    few = partial(throughputs, prompt_tokens=16, new_tokens=2, repeats=1)
    with peaks.watching(), patch("atp.run.throughputs", few):
        Run(config, resume=False, command="benchmarks.plan_memory", say=lambda line: None).execute()
    return peaks.bytes


def planned(config: ATPConfig) -> dict[str, dict[str, Any]]:
    """What the plan says, by part."""
    found, tokenizer = load_shapes(config.model), load_tokenizer(config.model)
    resolved = resolve(config, shapes=found)
    job = Workload.of(
        resolved, ModelShapes.of(found, resolved.decisions),
        autocast=autocast_dtype(resolved.training.precision), device="cpu",
        questions=Questions.of(check_tasks(config, load_data(config, tokenizer).splits, tokenizer, found)),
    )  # fmt: skip
    return {str(row["phase"]): row for row in memory_of(job)}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _of_libraries() -> int:
    """Resident pages of shared libraries; those of weights that are mapped from their file are the model's."""
    found, library = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # the first line of a mapping: addresses, and the path at the end
            library = bool(rest) and (".so." in rest[-1] or rest[-1].endswith(".so"))
        elif name == "Rss:" and library:
            found += 1024 * int(rest[0])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Prints one line per part: planned, measured, their ratio, and what the plan consists of."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("config", type=Path)
    options.add_argument("overrides", nargs="*")
    given = options.parse_args(arguments)
    config = ATPConfig.load(given.config, given.overrides)
    found, expected = apart(measured, config), planned(config)
    if not ranks.is_main():
        return 0
    print(f"{'part':<12} {'planned':>9} {'measured':>9} {'ratio':>6}  MiB")
    for part, peak in found.items():
        row = expected.get(part)
        if row is None:
            print(f"{part:<12} {'':>9} {peak / MIB:>9.0f}")
            continue
        parts = ", ".join(f"{name} {size / MIB:.0f}" for name, size in row["parts"].items())
        print(f"{part:<12} {row['bytes'] / MIB:>9.0f} {peak / MIB:>9.0f} {row['bytes'] / peak:>6.2f}  {parts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
