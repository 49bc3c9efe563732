"""Benchmark case of the cross-entropy whose gradient takes the place of the logits."""

from functools import partial

import torch
from torch import Tensor

from atp_kernels import cross_entropy_
from benchmarks.case import Case, Op, Variant, Variants, Work
from benchmarks.linears import by_backend

_TESTS = ("tests/atp_kernels/test_cross_entropy_kernel.py",)


def unfused(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their sum as transformers and autograd compute them, over a float32 copy."""
    logits = logits.detach().requires_grad_()
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def entropy(case: Case) -> Variants:
    """The logits of all tokens at once. Ours overwrites a copy of its own, which is all that the floor makes."""
    rng = torch.Generator(case.device).manual_seed(0)
    shape = (case.tokens, case.sizes.vocab)
    logits = torch.randn(shape, generator=rng, device=case.device).to(case.torch_dtype)
    targets = torch.randint(shape[1], shape[:1], generator=rng, device=case.device)
    holds = (logits, targets)

    def ours(backend: str) -> Variant:
        def call() -> tuple[Tensor, Tensor]:
            slope = logits.clone()
            return cross_entropy_(slope, targets, backend=backend), slope

        return Variant(call, holds=holds)

    return {
        "unfused": Variant(partial(unfused, *holds), holds=holds),
        **by_backend("cross_entropy_", (logits,), ours),
        "floor": Variant(logits.clone, same=False, holds=holds),
    }


def entropy_work(case: Case) -> dict[str, Work]:
    """Every logit is read and replaced; two exponentials and four other operations are made of it."""
    elements = case.tokens * case.sizes.vocab
    return {"forward": Work(6 * elements, 2 * case.torch_dtype.itemsize * elements)}


_NAME = "cross_entropy"
OPS = (Op(_NAME, entropy, entropy_work, lambda model: ("logits",), _TESTS, passes=("forward",), ignores=("rank",)),)
