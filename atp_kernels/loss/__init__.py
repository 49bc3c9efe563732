"""Cross-entropy whose gradient takes the place of the logits."""

import torch
from torch import Tensor

from atp_kernels.checks import check_range
from atp_kernels.kinds import typed
from atp_kernels.loss import op


@typed
def cross_entropy_(logits: Tensor, targets: Tensor, *, backend: str = "auto") -> Tensor:
    """-log softmax(logits)[target] of each row; the gradient of the sum of these losses replaces the logits.

    logits [rows, vocab], floating, becomes softmax(logits) - onehot(target), rounded once; targets int64 [rows], from 0
    to vocab - 1. Returns [rows], float32 (float64 for float64), and softmax is computed in that dtype. It records
    nothing: it is meant for autograd functions of your own. Raises ValueError for wrong shapes, dtypes or devices, for
    logits that require a gradient or hold several elements in one place of memory, and on a CPU for a target out of
    range.
    Source: the gradient of softmax cross-entropy, docs/method.md section 4.

    >>> logits = torch.zeros(1, 4)
    >>> cross_entropy_(logits, torch.tensor([2]))
    tensor([1.3863])
    >>> logits  # softmax - onehot
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits are {logits.dtype} of shape {list(logits.shape)}: give floating ones [rows, vocab].")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or targets.device != logits.device:
        given = f"{targets.dtype} of shape {list(targets.shape)} on {targets.device}"
        raise ValueError(f"targets are {given}, but the logits need int64 [{logits.shape[0]}] on {logits.device}.")
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("cross_entropy_ overwrites its logits, and these require a gradient: detach them first.")
    try:
        return op.cross_entropy_op(logits, targets, backend)
    except RuntimeError:
        # Only now, because a training step has no need to read every target.
        if targets.device.type == "cpu":
            check_range("targets hold", targets, logits.shape[1], "target")
        raise
