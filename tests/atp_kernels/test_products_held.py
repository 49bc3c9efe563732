"""oneDNN keeps the products of a run, whose layers and steps have many shapes."""

import os
import re
import subprocess
import sys

import pytest
import torch

PRODUCTS = """
import atp_kernels, torch
for _ in range(2):
    print("round", flush=True)
    for rows in range(1, 1400):
        torch.mm(torch.ones(rows, 16, dtype=torch.bfloat16), torch.ones(16, 16, dtype=torch.bfloat16))
"""
VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def compiled(**environment):
    """How many products are compiled in each of two rounds of 1,399."""
    own = {name: value for name, value in os.environ.items() if name != VARIABLE}
    settings = own | {"ONEDNN_VERBOSE": "profile_create"} | environment
    command = [sys.executable, "-c", PRODUCTS]
    output = subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout
    return [len(re.findall("create:cache_miss.*matmul", part)) for part in output.split("round\n")[1:]]


def test_each_shape_is_compiled_once_unless_the_environment_wants_less():
    first, second = compiled()
    if not first:
        pytest.skip(f"oneDNN has no such products here: {torch.backends.cpu.get_cpu_capability()}")
    assert first > 1024 and second == 0
    assert compiled(**{VARIABLE: "1024"})[1] > 1000
