"""Benchmark cases of RMSNorm: the norm in front of a layer's linears, alone and after the residual addition."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from atp_kernels import add_rms_norm, rms_norm
from benchmarks.case import Case, Op, Variant, Variants, Work
from benchmarks.linears import by_backend

_TESTS = ("tests/atp_kernels/test_rms_norm.py", "tests/atp_kernels/test_norm_triton.py")
_EPS = 1e-5


def unfused(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers computes it: float32 inside, rounded to the dtype of x, times the weight."""
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + _EPS).rsqrt()).to(x.dtype)


def norm(case: Case) -> Variants:
    """A frozen weight, as in LoRA training; the floor copies x."""
    rng = torch.Generator(case.device).manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=rng, device=case.device).to(case.torch_dtype)  # noqa: E731
    x, grad = draw(case.tokens, case.sizes.hidden).requires_grad_(), draw(case.tokens, case.sizes.hidden)
    weight = 1 + draw(case.sizes.hidden) / 10

    def ours(backend: str) -> Variant:
        call = partial(rms_norm, x, weight, eps=_EPS, backend=backend)
        return Variant(call, (x,), grad, holds=(x, weight))

    return {
        "unfused": Variant(partial(unfused, x, weight), (x,), grad, holds=(x, weight)),
        **by_backend("rms_norm", (x, weight), ours),
        "floor": Variant(x.clone, (x,), grad, same=False, holds=(x,)),
    }


def norm_work(case: Case) -> dict[str, Work]:
    """Forward reads x and writes y; backward reads both x and the gradient of y and writes that of x."""
    elements, item = case.tokens * case.sizes.hidden, case.torch_dtype.itemsize
    return {"forward": Work(4 * elements, 2 * item * elements), "backward": Work(8 * elements, 3 * item * elements)}


def sum_and_norm(case: Case) -> Variants:
    """The stream and a block's output in one dtype; `two_steps` adds before `rms_norm`, the floor copies both."""
    rng = torch.Generator(case.device).manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=rng, device=case.device).to(case.torch_dtype)  # noqa: E731
    shape = case.tokens, case.sizes.hidden
    inputs, grads = (draw(*shape).requires_grad_(), draw(*shape).requires_grad_()), (draw(*shape), draw(*shape))
    weight = 1 + draw(case.sizes.hidden) / 10

    def added(function: Callable[[Tensor], Tensor]) -> Variant:
        def forward() -> tuple[Tensor, Tensor]:
            stream = inputs[0] + inputs[1]
            return stream, function(stream)

        return Variant(forward, inputs, grads, holds=(inputs, weight))

    def ours(backend: str) -> Variant:
        call = partial(add_rms_norm, *inputs, weight, eps=_EPS, backend=backend)
        return Variant(call, inputs, grads, holds=(inputs, weight))

    copies = Variant(lambda: tuple(x.clone() for x in inputs), inputs, grads, same=False, holds=(inputs,))
    return {
        "unfused": added(partial(unfused, weight=weight)),
        "two_steps": added(partial(rms_norm, weight=weight, eps=_EPS)),
        **by_backend("add_rms_norm", (*inputs, weight), ours),
        "floor": copies,
    }


def sum_and_norm_work(case: Case) -> dict[str, Work]:
    """Forward reads both and writes two results; backward reads the sum and two gradients and writes one."""
    elements, item = case.tokens * case.sizes.hidden, case.torch_dtype.itemsize
    return {"forward": Work(5 * elements, 4 * item * elements), "backward": Work(9 * elements, 4 * item * elements)}


OPS = (
    Op("rms_norm", norm, norm_work, lambda model: ("input_layernorm",), _TESTS, ignores=("rank",)),
    Op(
        "add_rms_norm", sum_and_norm, sum_and_norm_work, lambda model: ("post_attention_layernorm",), _TESTS,
        ignores=("rank",),
    ),
)  # fmt: skip
