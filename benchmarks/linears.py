"""What benchmarks of linears share: operands, marks, the floor, the work, and a variant for each backend."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atp_kernels import available_backends, explain
from benchmarks.baselines import AddmmLora, unfused
from benchmarks.case import Case, Variant, Variants, Work

TESTS = tuple(f"tests/atp_kernels/test_{name}.py" for name in ("linear", "linear_triton", "kept", "ops"))


def by_backend(op: str, tensors: tuple[Tensor, ...], variant: Callable[[str], Variant]) -> Variants:
    """`ours` as a user gets it, and `ours:NAME` on every backend that takes the call, for others the reason."""
    found: Variants = {"ours": variant("auto")}
    for name, reason in available_backends().items():
        found[f"ours:{name}"] = reason or _refusal(op, tensors, name) or variant(name)
    return found


def _refusal(op: str, tensors: tuple[Tensor, ...], backend: str) -> str | None:
    try:
        explain(op, *tensors, backend=backend)
    except RuntimeError as error:
        return str(error)
    return None


def operands(case: Case, *, train_factors: bool) -> tuple[tuple[Tensor, ...], Tensor, torch.Generator]:
    """Random (x, weight, lora_a, lora_b), dL/dy, and the generator for what else is drawn."""
    (n_out, n_in), rank = case.linear, case.rank
    rng = torch.Generator(case.device).manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=rng, device=case.device).to(case.torch_dtype)  # noqa: E731
    x = draw(case.tokens, n_in).requires_grad_()
    weight = draw(n_out, n_in).div_(n_in**0.5)
    lora_a = draw(rank, n_in).div_(n_in**0.5).requires_grad_(train_factors)
    lora_b = draw(n_out, rank).requires_grad_(train_factors)
    return (x, weight, lora_a, lora_b), draw(case.tokens, n_out), rng


def floor(case: Case, n_out: int, n_in: int) -> Variant:
    """The dense products of the kept size alone: y = x W^T and dx = dy W."""
    x = torch.randn(case.tokens, n_in, device=case.device).to(case.torch_dtype).requires_grad_()
    weight, grad = (torch.randn(n, k, device=case.device).to(x.dtype) for n, k in ((n_out, n_in), (case.tokens, n_out)))
    return Variant(lambda: x @ weight.T, (x,), grad, same=False, holds=(x, weight))


def marks(
    case: Case, tensors: tuple[Any, ...], inputs: tuple[Tensor, ...], grad: Tensor, masks: dict[str, Any]
) -> dict[str, Variant]:
    torch.compiler.reset()  # one graph per case, since shapes of earlier cases would make this one dynamic
    compiled = torch.compile(unfused, fullgraph=True, dynamic=False)
    factors = tuple(tensor for tensor in (tensors[0], *tensors[2:]) if tensor.requires_grad)
    return {
        "unfused": Variant(partial(unfused, *tensors, **masks), inputs, grad, holds=tensors),
        "compile": Variant(partial(compiled, *tensors, **masks), inputs, grad, holds=tensors),
        "addmm": Variant(partial(AddmmLora.apply, *tensors), factors, grad, same=not masks, holds=tensors),
    }


def linear_work(case: Case, sides: tuple[str, ...] = (), *, soft: bool = False) -> dict[str, Work]:
    """FLOPs and bytes of y = m (x W^T) + (x A^T) B^T; soft: mask with gradient on the sum, factors frozen.

    Only the kept part of W is read and multiplied. A LoRA step saves S = x A^T and reads x and S again for dA and dB;
    a decision step saves the sum and reads it again for dL/dm.
    """
    (n, k), m, r = case.linear, case.tokens, case.rank
    kept_n, kept_k = kept_sizes(case, sides)
    item, lora = case.torch_dtype.itemsize, r * (n + k)
    product = 2 * m * kept_n * kept_k
    once = m * k + kept_n * kept_k + lora + m * n
    if soft:
        forward = Work(product + 2 * m * lora + m * n, item * (once + m * n) + 4 * n)
        backward = Work(product + 2 * m * lora + 3 * m * n, item * (once + m * n) + 8 * n)
    else:
        forward = Work(product + 2 * m * lora, item * (once + m * r))
        backward = Work(product + 4 * m * lora, item * (once + m * k + m * r + lora))
    return {"forward": forward, "backward": backward}


def kept_sizes(case: Case, sides: tuple[str, ...]) -> tuple[int, int]:
    n_out, n_in = case.linear
    return (
        round(n_out * case.keep) if "out_mask" in sides else n_out,
        round(n_in * case.keep) if "in_mask" in sides else n_in,
    )
