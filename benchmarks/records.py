"""Rows of results: where they were measured, and a CSV file that only grows."""

import csv
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from atp_kernels.tuning.table import tables_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str | int | float]


def environment(device: str) -> Row:
    """Device, threads, versions, commit and tuned tables, as every row carries them."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": git.stdout.strip() or "unknown",
        "tables": _tables(device),
    }


def append(path: Path, rows: list[Row]) -> None:
    """Adds rows to a CSV file and keeps all that it holds.

    Columns that the file lacks are added to it, those that the rows lack stay empty; such a file is replaced as a
    whole, so that an interrupted write leaves the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old, header = read(path), _header(path)
    columns = list(dict.fromkeys([*header, *(name for row in rows for name in row)]))
    if columns == header:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, lineterminator="\n").writerows(rows)
        return
    fresh = path.with_suffix(".tmp")
    with fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *rows])
    os.replace(fresh, path)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _tables(device: str) -> str:
    """How many entries of tuned tables dispatch may go by: a table of another device or version is not read."""
    entries = sum(len(table.entries) for table in tables_of(torch.device(device)))
    return str(entries or "none")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
