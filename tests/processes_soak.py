"""Runs in two processes, half of them broken off at random: do all end, equal to a run in one process?

    python tests/processes_soak.py             10 runs, 5 of them interrupted, in about 8 minutes
    python tests/processes_soak.py --runs 4 --seed 3
    python tests/processes_soak.py --restarts  torchrun starts killed processes again

A run is broken off by SIGTERM or SIGINT to torchrun, or SIGKILL to one of its two processes, and then resumed; with
--restarts by SIGKILL alone, and it must go on by itself. Exit status 1 if a run did not end or ended otherwise than the
one in a single process.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "atp")]

from launched_runs import STEPS, assert_equal, ended, start, write_settings  # noqa: E402
from tiny_inputs import tiny_config  # noqa: E402

SIGNALS, KILLS = ["SIGTERM", "SIGINT"], ["SIGKILL of process 0", "SIGKILL of process 1"]


def break_off(process, folder: Path, draw: random.Random, ways: list[str]) -> str:
    """Waits for a random step, or for a random time before the first, breaks the run off and says how."""
    step, delay = draw.randint(0, STEPS - 1), draw.uniform(0, 0.5)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_bytes().splitlines()) >= step):
        time.sleep(0.01)
    time.sleep(delay)
    workers = psutil.Process(process.pid).children() if process.poll() is None else []
    what = draw.choice(ways)
    if what in SIGNALS:
        os.kill(process.pid, getattr(signal, what))
    elif len(workers) == 2:
        workers[int(what[-1])].kill()
    return f"{what} after step {step} and {delay:.2f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restarts", action="store_true", help="no run is resumed by hand")
    options = parser.parse_args()
    draw, failed = random.Random(options.seed), 0
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "inputs").mkdir()
        two, one = write_settings(tiny_config(root / "inputs"), root)
        ended(start(["train", str(one), f"output_dir={root / 'one'}"], two=False))
        for number in range(options.runs):
            folder, told, since = root / f"run-{number}", "not broken off", time.perf_counter()
            command = ["train", str(two), f"output_dir={folder}"]
            process = start(command, launcher=["--max-restarts", "2"] if options.restarts else ())
            try:
                if number % 2:
                    told = break_off(process, folder, draw, KILLS if options.restarts else SIGNALS + KILLS)
                if number % 2 and not options.restarts:
                    process.communicate(timeout=300)
                    told += f", exit code {process.returncode}"
                    # Stopped before it wrote its config, a run is started again.
                    process = start([*command, *["--resume"] * (folder / "config.yaml").is_file()])
                ended(process)
                assert_equal(folder, root / "one")
                result = "equal"
            except AssertionError as error:
                result, failed = f"NOT EQUAL: {error}", failed + 1
            print(f"run {number}: {told}: {result}, {time.perf_counter() - since:.0f} s", flush=True)
    print(f"{options.runs - failed} of {options.runs} runs ended equal to one process")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
