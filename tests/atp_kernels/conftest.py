"""Tests read no table that somebody has tuned on this machine."""

import os

import pytest
import torch

os.environ["ATP_KERNELS_TABLES"] = os.devnull


@pytest.fixture
def two_threads():
    """With more than one ATen gathers in another way, which takes memory, and native code shares its tiles out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
