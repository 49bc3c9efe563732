"""Cross-entropy in C++ on a CPU (csrc/cpu/cross_entropy.cpp)."""

from torch import Tensor

from atp_kernels import extension
from atp_kernels.call import Call


def supports(call: Call) -> str | None:
    """float32 and bfloat16 on a CPU."""
    return extension.refuses(call)


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """As `aten.cross_entropy_`, a row at a time, with sums in float32 and then in float64.

    Raises RuntimeError for a target outside the vocabulary.
    """
    held = logits.contiguous()
    losses = extension.ops.cross_entropy_(held, targets.contiguous())
    if held is not logits:
        logits.copy_(held)
    return losses
