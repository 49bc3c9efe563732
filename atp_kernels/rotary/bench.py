"""Benchmark case of the rotary embedding: queries and keys of a layer, heads before tokens."""

from functools import partial

import torch
from torch import Tensor

from atp_kernels import rotary_embedding
from benchmarks.case import Case, Op, Variant, Variants, Work
from benchmarks.linears import by_backend

_TESTS = ("tests/atp_kernels/test_rotary.py",)


def unfused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers computes it, on views with heads before tokens."""
    q, k, cos, sin = q.transpose(1, 2), k.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotary(case: Case) -> Variants:
    """One sample of all tokens; the floor copies q and k."""
    sizes, rng = case.sizes, torch.Generator(case.device).manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=rng, device=case.device).to(case.torch_dtype)  # noqa: E731
    q, k = (draw(1, case.tokens, heads, sizes.head_dim).requires_grad_() for heads in (sizes.heads, sizes.kv_heads))
    cos, sin = draw(1, case.tokens, sizes.head_dim), draw(1, case.tokens, sizes.head_dim)
    inputs, held = (q, k), (q, k, cos, sin)
    grad = tuple(draw(1, x.shape[2], case.tokens, sizes.head_dim) for x in inputs)

    def ours(backend: str) -> Variant:
        return Variant(partial(rotary_embedding, *held, backend=backend), inputs, grad, holds=held)

    def copied() -> tuple[Tensor, Tensor]:
        return q.transpose(1, 2).clone(), k.transpose(1, 2).clone()

    return {
        "unfused": Variant(partial(unfused, *held), inputs, grad, holds=held),
        **by_backend("rotary_embedding", (q,), ours),
        "floor": Variant(copied, inputs, grad, same=False, holds=held),
    }


def rotary_work(case: Case) -> dict[str, Work]:
    """Each way reads and writes every element once."""
    sizes = case.sizes
    elements = case.tokens * sizes.head_dim * (sizes.heads + sizes.kv_heads)
    work = Work(3 * elements, 2 * case.torch_dtype.itemsize * elements)
    return {"forward": work, "backward": work}


OPS = (Op("rotary_embedding", rotary, rotary_work, lambda model: ("q and k",), _TESTS, ignores=("rank",)),)
