"""A whole one-stage run beside LoRA on the dense model for as many steps, each in a process of its own.

    python -m benchmarks.whole_run --steps 30
    python -m benchmarks.whole_run --side atp --dtype bfloat16 --space head_dim
    python -m benchmarks.whole_run --device cuda --model 1b --dtype bfloat16 --length 1024

A random-weight Llama trains on random tokens, the same on both sides: `atp` is `ATPTrainer` from the first step to the
end of tune, `dense` is `LoraTuner` over stock PEFT layers. Phases are in the ratio of the default config, so is all
that no option names. Each side runs in each dtype, the quicker one stands for it, and rows are appended to
RESULTS/whole_run.csv. Exit status 1 if a mark is missed, unless --lenient.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import torch

from atp.baselines.tuner import LoraTuner, stock_lora
from atp.config import ATPConfig, TrainingConfig
from atp.data import PackedDataset
from atp.training.callbacks import Callback, Record
from atp.training.loop import Loop
from atp.training.trainer import ATPTrainer
from benchmarks.gate import Mark, conclude
from benchmarks.measure import reset_resident_peak, resident_peak_bytes
from benchmarks.records import RESULTS, Row, append, environment
from benchmarks.run import MIB
from benchmarks.shapes import find_model
from benchmarks.steps import WIDTHS, random_model

SIDES = ("atp", "dense")
_CALIBRATION_WINDOWS = 64


class Peaks(Callback):
    """Peak memory by phase, in MiB: `start` until a phase is entered, `cut` between two.

    That of a CPU is what is resident of the process, that of a GPU what torch has allocated on it.
    """

    def __init__(self, device: str) -> None:
        on_gpu = device == "cuda"
        self._reset = torch.cuda.reset_peak_memory_stats if on_gpu else reset_resident_peak
        self._peak = torch.cuda.max_memory_allocated if on_gpu else resident_peak_bytes
        self.phase = "start"
        self.mib: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """Counts from here towards a phase."""
        if phase != self.phase:
            self.close()
            self.phase = phase
            self._reset()

    def close(self) -> None:
        """Notes the peak of the phase under way."""
        self.mib[self.phase] = self._peak() / MIB

    def on_phase(self, loop: Loop) -> None:
        self.enter(loop.phase)

    def on_step(self, loop: Loop, record: Record | None) -> None:
        if loop.step == loop.phases.cut_step:
            self.enter("cut")


def phases(steps: int) -> dict[str, int]:
    """So many LoRA steps, 3 at least, by phase in the ratio of the default config."""
    training = TrainingConfig(steps=steps)
    return {"open": training.opened, "search": training.search, "settle": training.settle, "steps": steps}


def config_of(options: argparse.Namespace, dtype: str, folder: str) -> ATPConfig:
    """What both sides run under; the dense one takes its LoRA, its number of steps and its optimizer."""
    return ATPConfig.parse(
        {
            "model": {"path": options.model},
            "output_dir": folder,
            "decisions": {
                "space": options.space,
                "target_keep": options.keep,
                "multiples": WIDTHS[options.device],
            },
            "lora": {"r": options.rank, "alpha": options.rank, "dropout": options.dropout},
            "training": phases(options.steps) | {"batch_size": options.batch, "precision": dtype},
        }
    )


def windows(count: int, options: argparse.Namespace) -> PackedDataset:
    """Random tokens, int64 [count, length]."""
    ids = torch.randint(find_model(options.model).vocab, (count, options.length))
    return PackedDataset(ids, ids)


def trainer_of(options: argparse.Namespace, side: str, config: ATPConfig) -> ATPTrainer | LoraTuner:
    """The trainer of one side. No name is left for the uncut model, so that the cut can release it."""
    torch.manual_seed(0)
    train, calibration = windows(options.steps * options.batch, options), windows(_CALIBRATION_WINDOWS, options)
    model = random_model(find_model(options.model), options.length, torch.float32)
    if side == "atp":
        return ATPTrainer(config, model, train, calibration)
    return LoraTuner(config, stock_lora(model, config), train, Path(config.output_dir))


def measure(options: argparse.Namespace, side: str, dtype: str) -> list[Row]:
    """One row a phase of a run of one side in this process, one for what lies outside phases, and one for it all.

    `start` is the process before the run: libraries, model, data. `other` is the rest of the run's seconds, mostly
    checkpoints.
    """
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        trainer = trainer_of(options, side, config_of(options, dtype, folder))
        peaks = Peaks(options.device)
        trainer.callbacks.append(peaks)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        peaks.close()
    clock = trainer.clock
    spent = clock.seconds | {"other": seconds - sum(clock.seconds.values()), "run": seconds}
    tokens = clock.tokens | {"run": sum(clock.tokens.values())}
    reached = peaks.mib | {"run": max(peaks.mib.values())}
    names = ("steps", "batch", "length", "model", "space", "rank", "keep", "dropout")
    given = {name: getattr(options, name) for name in names} | {"dtype": dtype, "side": side}
    return [
        given
        | {
            "phase": phase,
            "seconds": round(spent[phase], 3) if phase in spent else "",
            "tokens": tokens.get(phase, 0),
            "tokens_per_second": round(tokens.get(phase, 0) / spent[phase], 1) if phase in spent else "",
            "peak_mib": round(reached[phase], 1) if phase in reached else "",
        }
        for phase in dict.fromkeys(["start", *spent])
    ]


def apart(function: Callable[..., list[Row]], *arguments: object) -> list[Row]:
    """The result of a call in a fresh process, whose memory is its own and which ends with the call.

    Raises EOFError when that process ends without a result.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, *arguments))
    process.start()
    sender.close()  # so that only the process holds it, and its end is seen
    try:
        return receiver.recv()
    finally:
        process.join()


def _send(sender: Connection, function: Callable[..., list[Row]], *arguments: object) -> None:
    Thread(target=_end_with_the_caller, daemon=True).start()
    sender.send(function(*arguments))


def _end_with_the_caller() -> None:
    """A caller that a signal ends would leave this process behind, at work for nobody."""
    caller = parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)


def quickest(rows: list[Row], side: str) -> dict[str, Row]:
    """The rows of one side by phase, in the dtype of its shortest run."""
    rows = [row for row in rows if row["side"] == side]
    best = min((row for row in rows if row["phase"] == "run"), key=lambda row: float(row["seconds"]))
    return {row["phase"]: row for row in rows if row["dtype"] == best["dtype"]}


def marks(rows: list[Row]) -> list[Mark]:
    """What must hold of the two sides."""
    ours, dense = (quickest(rows, side) for side in SIDES)

    def ratio(column: str, phase: str) -> float:
        return float(ours[phase][column]) / float(dense["run"][column])

    which = f"atp {ours['run']['dtype']}, dense {dense['run']['dtype']}"
    return [
        Mark(f"seconds of the whole run over dense LoRA ({which})", ratio("seconds", "run"), 1.6, at_most=True),
        Mark("peak memory of the whole run over dense", ratio("peak_mib", "run"), 1.1, at_most=True),
        Mark("peak memory after the cut over dense", ratio("peak_mib", "tune"), 1.0, at_most=True),
    ]


def line(row: Row) -> str:
    """One phase for a reader."""
    rate = row["tokens_per_second"] or ""
    return (
        f"{row['side']:<6} {row['dtype']:<9} {row['phase']:<9} {row['seconds']:>9} s {rate:>8} tokens/s "
        f"peak {row['peak_mib']:>8} MiB"
    )


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=30, help="LoRA steps of each side, 3 at least")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--space", default="kv_group", choices=("kv_group", "head_dim"), help="mask space")
    options.add_argument("--keep", type=float, default=0.6, help="share of decoder parameters that stays")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--dropout", type=float, default=0.0, help="of LoRA; PEFT's own is slow on a CPU")
    options.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    options.add_argument("--side", nargs="+", default=list(SIDES), choices=SIDES, help="without both no marks")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--lenient", action="store_true", help="exit with 0 though a mark is missed")
    options.add_argument("--out", type=Path, default=RESULTS)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures both sides, prints them and the marks, and returns the exit status."""
    options = parser().parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the loop takes a GPU where it sees one
    torch.set_num_threads(options.threads)
    where, rows = environment(options.device), []
    for dtype in options.dtype:
        for side in options.side:
            measured = apart(measure, options, side, dtype)
            append(options.out / "whole_run.csv", [where | row for row in measured])
            print(*map(line, measured), sep="\n", flush=True)
            rows += measured
    if len(set(options.side)) < len(SIDES):
        return 0
    return conclude(marks(rows)) and not options.lenient


if __name__ == "__main__":
    sys.exit(main())
