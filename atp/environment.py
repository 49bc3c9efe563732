"""Versions, devices and kernel backends: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

import atp_kernels

_PACKAGES = ("atp-kernels", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "safetensors", "gguf")


def versions() -> dict[str, str]:
    """Versions of Python and of our dependencies; `absent` for those that are not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def slow_kernels() -> str | None:
    """Why the C++ kernels are missing; None if they are present, or if ATP_BUILD=0 skipped them."""
    reason = atp_kernels.available_backends()["native"]
    unwanted = os.environ.get("ATP_BUILD") == "0" or (reason is not None and "ATP_BUILD=0 says so" in reason)
    return None if unwanted else reason


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
