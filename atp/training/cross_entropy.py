"""Cross-entropy straight from hidden states, a few tokens at a time: the logits of a whole batch never exist.

They would be the largest tensor of a step: 4 x 256 tokens of a 49,152-word vocabulary take 200 MB in float32, several
times over with softmax and gradient. Here loss and gradients are computed together, chunk by chunk.
`torch.nn.functional.linear_cross_entropy` does the same and sums in the dtype of its inputs, which costs digits in
bfloat16; how fast it is, dev/LOG.md says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from atp_kernels import cross_entropy_
from atp_kernels.call import differentiable_once

# Memory for the logits of one chunk; on a GPU the softmax takes twice as much on top. A matrix product wants about 300
# rows on a CPU and more on a GPU; larger chunks gain nothing.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 128 * 2**20}
TILE_ROWS = 128


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, cap: float | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[target], scalar in float32 or wider.

    cap: every product z becomes the logit cap * tanh(z / cap).

    hidden [tokens, hidden_size], weight [vocab, hidden_size], targets int64 [tokens], all of them scored. Products use
    the autocast dtype if autocast is on, otherwise that of hidden; softmax and sum use float32 (float64 for float64
    inputs). Differentiable in hidden, and in weight if it requires a gradient. On CUDA liger-kernel is used where it is
    installed, at the price of a host-device sync that reads its count of targets.
    """
    if hidden.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=cap)(weight, hidden, targets)
    return _ChunkedCrossEntropy.apply(hidden, _held(weight, _product_dtype(hidden)), targets, cap)


_casts: dict[Tensor, tuple[int, Tensor]] | None = None  # of heads, with the version of the weight that each was made of


@contextmanager
def held_heads() -> Iterator[None]:
    """Inside, frozen heads are cast to autocast's dtype once and not in each step.

    A CPU takes five times as long for the fresh memory of a cast as for the cast (dev/LOG.md).
    """
    global _casts
    before, _casts = _casts, {}
    try:
        yield
    finally:
        _casts = before


def _held(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen parameter in this dtype, from the step before if that made it; any other weight as it is.

    A parameter with a gradient is trained, also in a pass that takes it out of autograd.
    """
    trained = weight.requires_grad or weight.grad is not None
    if _casts is None or weight.dtype == dtype or trained or not isinstance(weight, nn.Parameter):
        return weight
    version, cast = _casts.get(weight, (None, weight))
    if version != weight._version or cast.dtype != dtype:
        cast = weight.detach().to(dtype)
        _casts[weight] = weight._version, cast
    return cast


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """With p = softmax(h W^T): dh = (p - onehot) W and dW = (p - onehot)^T h, formed in the forward pass.

    A cap multiplies p - onehot by 1 - tanh^2.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        device, dtype = hidden.device.type, _product_dtype(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=wide)
        rows = _rows(hidden, weight, dtype.itemsize)
        # Allocated once: page faults in fresh memory of this size cost a CPU more than the softmax.
        chunk = hidden.new_empty(rows, len(weight), dtype=dtype)
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            for start in range(0, len(hidden), rows):
                span = slice(start, start + rows)
                states = hidden[span].to(dtype)
                slope = torch.mm(states, head.T, out=chunk[: len(states)])
                bend = None if cap is None else _cap_(slope, cap)
                total += cross_entropy_(slope, targets[span]).sum()
                if bend is not None:
                    slope.mul_(bend)
                if d_hidden is not None:
                    d_hidden[span] = slope @ head
                if d_weight is not None:
                    d_weight += slope.T @ states
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden.to(grad.dtype) * grad).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None


def _cap_(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in place; returns its derivative, 1 - tanh^2, in new memory."""
    bend = logits.div_(cap).tanh_().square().neg_().add_(1)
    logits.mul_(cap)
    return bend


def _rows(hidden: Tensor, weight: Tensor, bytes_per_logit: int) -> int:
    """Tokens per chunk: on CUDA whole tiles of a product, of which the last would else be nearly empty."""
    rows = CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"] // (bytes_per_logit * len(weight))
    if hidden.is_cuda and rows > TILE_ROWS:
        rows -= rows % TILE_ROWS
    return max(min(rows, len(hidden)), 1)
