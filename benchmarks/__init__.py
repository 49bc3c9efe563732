"""Benchmarks of the kernels and of whole training steps; `python -m benchmarks --help` is the way in."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler prints two lines each time it is used
