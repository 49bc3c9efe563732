"""Versions, devices and kernel backends: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

import atp_kernels

_PACKAGES = ("atp-kernels", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "safetensors", "gguf")


def versions() -> dict[str, str]:
    """Versions of Python and of our dependencies; `absent` for those that are not installed.

    In a checkout also its commit, with a + if tracked files differ from it.
    """
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    commit = commit_of(Path(__file__).parents[2])
    return found if commit is None else found | {"commit": commit}


def commit_of(root: Path) -> str | None:
    """The commit of the checkout at `root`; None where there is none, or no git."""
    if not (root / ".git").exists():
        return None
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30)
            for arguments in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + "+" * bool(changed.stdout)


def slow_kernels() -> str | None:
    """Why the C++ kernels are missing; None if they are present, or if ATP_BUILD=0 skipped them."""
    reason = atp_kernels.available_backends()["native"]
    unwanted = os.environ.get("ATP_BUILD") == "0" or (reason is not None and "ATP_BUILD=0 says so" in reason)
    return None if unwanted else reason


def free_memory(device: str) -> int | None:
    """Bytes that a process may still take on this machine, on `cuda` of its GPU; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    known = [size for size in (_available(), _of_cgroup()) if size is not None]
    return min(known, default=None)


def _available() -> int | None:
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    return None


def _of_cgroup() -> int | None:
    """What a container's limit leaves."""
    with suppress(OSError, ValueError):  # no limit is the word `max`
        limit, used = (int(Path("/sys/fs/cgroup", f"memory.{name}").read_text()) for name in ("max", "current"))
        return max(limit - used, 0)
    return None


def device_name() -> str:
    """The device that training uses here: the GPU's name, or the processor's and its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"


def describe() -> dict[str, str]:
    """Versions, platform, devices, and for each kernel backend whether it is available or why not."""
    facts = versions() | {"platform": platform.platform(), "executable": Path(sys.executable).name}
    facts["cpu"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["cuda"] = f"{torch.version.cuda}: {', '.join(devices)}"
    else:
        facts["cuda"] = "no device"
    for name, reason in atp_kernels.available_backends().items():
        facts[f"backend {name}"] = reason or "available"
    return facts
