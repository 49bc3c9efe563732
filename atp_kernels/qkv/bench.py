"""Benchmark case of the projections of attention, without masks."""

from functools import partial

import torch
from torch import Tensor

from atp_kernels import masked_lora_qkv
from benchmarks.baselines import AddmmLora, unfused
from benchmarks.blocks import TESTS, block_work, projections
from benchmarks.case import Case, Op, Variant, Variants
from benchmarks.linears import by_backend

_QKV = ("q_proj", "k_proj", "v_proj")


def qkv(case: Case) -> Variants:
    """The projections of attention without masks; the floor is one product over their stacked weights."""
    x, linears = projections(case, _QKV, train_factors=True)
    inputs = (x, *(factor for linear in linears for factor in linear[1:3]))
    grads = tuple(torch.randn(case.tokens, len(linear.weight), device=x.device).to(x.dtype) for linear in linears)
    whole = torch.cat([linear.weight for linear in linears])

    def ours(backend: str) -> Variant:
        return Variant(partial(masked_lora_qkv, x, *linears, backend=backend), inputs, grads, holds=(x, linears))

    def each(linear) -> tuple[Tensor, ...]:
        return tuple(linear(x, *projection[:3]) for projection in linears)

    return {
        "unfused": Variant(partial(each, unfused), inputs, grads, holds=(x, linears)),
        "addmm": Variant(partial(each, AddmmLora.apply), inputs, grads, holds=(x, linears)),
        **by_backend("masked_lora_linear", (x, *linears[0][:3]), ours),
        "floor": Variant(lambda: x @ whole.T, (x,), torch.cat(grads, 1), same=False, holds=(x, whole)),
    }


OPS = (Op("qkv_unmasked", qkv, partial(block_work, names=_QKV), lambda model: ("attention",), TESTS),)
