"""`atp sweep`: several targets from one open phase, and their results as CSV, JSON and PNG."""

from atp.sweep.sweep import Sweep

__all__ = ["Sweep"]
