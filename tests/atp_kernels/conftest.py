"""Tests read no table that somebody has tuned on this machine."""

import os

os.environ["ATP_KERNELS_TABLES"] = os.devnull
