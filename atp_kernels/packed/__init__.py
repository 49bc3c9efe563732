"""Frozen linears of one input with their adapters packed beside them: one matrix product where there were several.

A short step is bound by the number of its calls, and by casts. Base and adapter of all linears that read x are

    y = [x, S] [W, B]^T + bias,   S = x (scaling A)^T

with W, A and bias of all linears stacked and B in blocks; backward, [dx', dS] = dy [W, B] is one product as well. W is
cast once. A and B are written beside it once in each pass, where `masked_lora_linear` casts them in each call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_kernels import extension
from atp_kernels.projection import Projection

_PLAIN = (Tensor, torch.nn.Parameter)


class PackedLinears:
    """Linears of one input [..., in] in bfloat16 on a CPU, from float32 weights and factors of the same scaling.

    weight [rows of all, in + ranks of all]: the frozen weights, with the factors B of the pass under way. down [ranks
    of all, in]: the scaled factors A. bias [rows of all] or None. Factors lie in the order of the linears, A before B.
    """

    def __init__(self, linears: Sequence[Projection]) -> None:
        """Raises ValueError for linears that `refuses` has a reason against."""
        problem = refuses(linears)
        if problem:
            raise ValueError(f"the linears cannot be packed: {problem}.")
        self._sources = [_source(p) for p in linears]
        self.scaling = float(linears[0].scaling)
        self.sizes = [len(p.weight) for p in linears]
        self.inputs, ranks = linears[0].weight.shape[1], sum(len(p.lora_a) for p in linears)
        self.weight = torch.zeros(sum(self.sizes), self.inputs + ranks, dtype=torch.bfloat16)
        for p, rows in zip(linears, self.weight.split(self.sizes), strict=True):
            rows[:, : self.inputs].copy_(p.weight.detach())
        self.down = torch.empty(ranks, self.inputs, dtype=torch.bfloat16)
        self.bias: Tensor | None = None
        if any(p.bias is not None for p in linears):
            biases = [torch.zeros(len(p.weight)) if p.bias is None else p.bias.detach().float() for p in linears]
            self.bias = torch.cat(biases).to(torch.bfloat16)

    def holds(self, linears: Sequence[Projection]) -> bool:
        """Whether this was made from these weights, as they are now, with adapters of these ranks."""
        return len(linears) == len(self._sources) and all(
            p.weight is weight and p.weight._version == version and p.bias is bias and len(p.lora_a) == rank
            for p, (weight, version, bias, rank) in zip(linears, self._sources, strict=True)
        )


def refuses(linears: Sequence[Projection]) -> str | None:
    """Why these linears cannot be packed; None where they can."""
    if extension.REASON is not None:
        return extension.REASON
    for p in linears:
        tensors = (p.weight, p.lora_a, p.lora_b)
        if any(type(t) not in _PLAIN or t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
            return "weights and factors must be float32 on a CPU"
        if not (p.lora_a.is_contiguous() and p.lora_b.is_contiguous() and len(p.lora_a) and p.weight.numel()):
            return "factors must be contiguous and not empty"
        if p.weight.requires_grad or (p.bias is not None and p.bias.requires_grad):
            return "weights and biases must be frozen"
    if len({float(p.scaling) for p in linears}) > 1 or len({p.weight.shape[1] for p in linears}) > 1:
        return "one input and one scaling are for all"
    return None


def _source(p: Projection) -> tuple[Tensor, int, Tensor | None, int]:
    return p.weight, p.weight._version, p.bias, len(p.lora_a)
