"""Attention of short windows on a CPU, as matrix products of whole groups of queries.

torch's fused kernel for CPUs takes blocks of 32 to 256 queries of one head at a time, and its backward pass computes
the scores again. In windows of a few hundred tokens its products are too small to be fast. Here the queries of all
heads that share a key are one product, and the probabilities are kept (dev/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atp_kernels.call import differentiable_once

LONGEST = 256
"""Tokens of the longest window: the probabilities, tokens x tokens for each head, must stay small."""

_SCORES = 2**19  # of the rows of a batch that are computed together: page faults in fresh memory cost more than they do


def suits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `short_attention` takes these and is faster than the fused kernel: in bfloat16 alone."""
    tokens = query.shape[2]
    return (
        query.device.type == "cpu"
        and {_dtype(part) for part in (query, key, value)} == {torch.bfloat16}
        and 1 < tokens == key.shape[2] <= LONGEST
        and query.numel() > 0
        and (mask is None or mask.dtype == torch.bool)
        and not torch.compiler.is_compiling()
    )


def _dtype(states: Tensor) -> torch.dtype:
    """That of the products: autocast casts what the fused kernel reads too."""
    kind = states.device.type
    casts = torch.is_autocast_enabled(kind) and states.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else states.dtype


def short_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(scaling * Q K^T) V, [batch, heads, tokens, value width], in the dtype of value or that of autocast.

    query [batch, heads, tokens, width], key [batch, KV heads, tokens, width], value [batch, KV heads, tokens, value
    width]; heads are a multiple of KV heads, and so many in a row share one. mask: bool, [batch or 1, 1, tokens,
    tokens], True for what a token sees; None is causal. A token that sees nothing gets the mean of all values. Scores
    and softmax are float32 (float64 for such inputs).
    """
    tokens = query.shape[2]
    query, key, value = (part.to(_dtype(part)) for part in (query, key, value))
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    output: Tensor = _Attention.apply(query, key, value, mask, scaling)
    return output


class _Attention(torch.autograd.Function):
    """With P the probabilities: dV = P^T dO, dS = P (dP - sum(P dP)), dQ = scaling dS K, dK = scaling dS^T Q."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
        (batch, heads, tokens, _), count = query.shape, key.shape[1]
        q, k, v = (_groups(part, count) for part in (query, key, value))
        p = q.new_empty(len(q), q.shape[1], tokens)
        wide = torch.promote_types(query.dtype, torch.float32)
        unseen = torch.zeros(mask.shape, dtype=wide, device=mask.device).masked_fill_(~mask, torch.finfo(wide).min)
        unseen = unseen.expand(batch, 1, tokens, tokens)
        rows = max(_SCORES // (heads * tokens**2), 1)
        with torch.autocast(query.device.type, enabled=False):
            for start in range(0, batch, rows):
                groups = slice(start * count, (start + rows) * count)
                scores = torch.bmm(q[groups].to(wide), k[groups].to(wide).mT).mul_(scaling)
                scores.view(-1, heads, tokens, tokens).add_(unseen[start : start + rows])
                p[groups] = scores.softmax(-1)
            output = torch.bmm(p, v)
        ctx.save_for_backward(q, k, v, p)
        ctx.scaling, ctx.batch, ctx.wide = scaling, batch, wide
        return output.view(batch, heads, tokens, -1)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        grad = _groups(grad, len(k) // ctx.batch)
        with torch.autocast(grad.device.type, enabled=False):
            d_scores = torch.bmm(grad, v.mT)
            d_scores.sub_((d_scores * p).sum(-1, keepdim=True, dtype=ctx.wide)).mul_(p)
            d_query, d_key = (part.mul_(ctx.scaling) for part in (torch.bmm(d_scores, k), torch.bmm(d_scores.mT, q)))
            found = d_query, d_key, torch.bmm(p.mT, grad)
        tokens = k.shape[1]
        return *(part.view(ctx.batch, -1, tokens, part.shape[-1]) for part in found), None, None


def _groups(states: Tensor, count: int) -> Tensor:
    """[batch, heads, tokens, width] as [batch x count, heads of a group x tokens, width]."""
    return states.reshape(states.shape[0] * count, -1, states.shape[-1])
