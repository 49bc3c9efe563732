"""Compaction in ATen calls: the definition itself."""

from atp_kernels.call import Call
from atp_kernels.compaction.definition import compact

__all__ = ["compact", "supports"]


def supports(call: Call) -> str | None:
    """Every call."""
    return None
