"""Operands of the masked LoRA linear, its results with every gradient, and the error rule for all dtypes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from atp_kernels.dropout.definition import Dropout
from atp_kernels.linear import definition
from benchmarks.case import Variant
from benchmarks.measure import peak_bytes

SEED = 0x9876_5432_1234_5678 - 2**64
"""Of any dropout; both halves have their high bit set or are large, and the whole is negative."""


@dataclass(frozen=True)
class Shape:
    m: int = 12
    n: int = 20
    k: int = 28
    rank: int = 4
    out_mask: str | None = "soft"
    in_mask: str | None = "soft"
    mask_lora: bool = False
    bias: bool = True
    dropout: bool = True
    """Whether there is a lora_input of its own; there is none where the linear itself drops, with probability p."""
    p: float = 0.0
    scaling: float = 1.7

    @property
    def options(self) -> dict[str, object]:
        """The arguments of a call that are no operands."""
        drawn = {"dropout": self.p, "seed": SEED} if self.p else {}
        return {"scaling": self.scaling, "mask_lora": self.mask_lora, **drawn}

    @property
    def drawn(self) -> Dropout | None:
        """The dropout of `options`, as backends take it."""
        return Dropout(self.p, SEED) if self.p else None

    def __str__(self) -> str:
        extras = [name for name in ("mask_lora", "bias", "dropout", "p") if getattr(self, name)]
        return "-".join([f"{self.m}x{self.n}x{self.k}r{self.rank}", str(self.out_mask), str(self.in_mask), *extras])


def every_combination(base: Shape) -> list[Shape]:
    """All masks and options on one size."""
    kinds = (None, "soft", "hard")
    others = ((True, False),) if base.p else ((False, True), (True, False))
    return [
        replace(base, out_mask=out_mask, in_mask=in_mask, mask_lora=mask_lora, bias=bias, dropout=dropout)
        for out_mask in kinds
        for in_mask in kinds
        for mask_lora in (False, True)
        for bias, dropout in others
    ]


def shapes(**changed: st.SearchStrategy) -> st.SearchStrategy[Shape]:
    """Shapes at random, with other strategies for some fields."""
    masks, sizes = st.sampled_from([None, "soft", "hard", "empty", "full"]), st.integers(1, 70)
    fields = {"m": st.sampled_from([1, 5, 33]), "n": sizes, "k": sizes, "rank": st.sampled_from([1, 8, 16])}
    fields |= {"out_mask": masks, "in_mask": masks, "p": st.sampled_from([0.0, 0.5])}
    fields |= dict.fromkeys(("mask_lora", "bias", "dropout"), st.booleans())
    return st.builds(Shape, **fields | {"scaling": st.sampled_from([0.25, 1.0, 2.0])} | changed)


def operands(shape: Shape, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors by argument name; all floating ones require a gradient."""
    rng = torch.Generator().manual_seed(seed)
    randn = lambda *size: torch.randn(size, generator=rng).to(dtype)  # noqa: E731
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def mask(kind: str | None, size: int) -> Tensor | None:
        values = torch.rand(size, generator=rng)
        full = {"empty": torch.zeros(size, dtype=torch.bool), "full": torch.ones(size, dtype=torch.bool)}
        return {None: None, "soft": values.to(wide), "hard": values > 0.4, **full}[kind]

    tensors = {
        "x": randn(shape.m, shape.k),
        "weight": randn(shape.n, shape.k) / shape.k**0.5,
        "lora_a": randn(shape.rank, shape.k) / shape.k**0.5,
        "lora_b": randn(shape.n, shape.rank),
        "bias": randn(shape.n) if shape.bias else None,
        "lora_input": randn(shape.m, shape.k) if shape.dropout and not shape.p else None,
        "out_mask": mask(shape.out_mask, shape.n),
        "in_mask": mask(shape.in_mask, shape.k),
    }
    return {name: _leaf(tensor) for name, tensor in tensors.items() if tensor is not None}


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def frozen(tensors: dict[str, Tensor], *more: str) -> dict[str, Tensor]:
    """The same with a weight, a bias and more that have no gradient."""
    return {name: each.detach() if name in ("weight", "bias", *more) else each for name, each in tensors.items()}


def upcast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values as float64 leaves."""
    return {
        name: tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def unfused(shape: Shape, tensors: dict[str, Tensor]) -> tuple[Tensor]:
    """The definition, by autograd, in the dtype of the operands."""
    y = definition.masked_lora_linear(**tensors, scaling=shape.scaling, mask_lora=shape.mask_lora, dropout=shape.drawn)
    return (y,)


def with_gradients(
    results: tuple[Tensor, ...], tensors: dict[str, Tensor], absolute: bool = False
) -> dict[str, Tensor]:
    """The results, and the gradient of one fixed random functional of them in every operand that wants one."""
    rng = torch.Generator().manual_seed(7)
    upstream = [torch.randn(result.shape, generator=rng).to(result) for result in results]
    upstream = [grad.abs() for grad in upstream] if absolute else upstream
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    grads = torch.autograd.grad(results, list(leaves.values()), upstream)
    named = {f"result {i}" if i else "y": result for i, result in enumerate(results)}
    return named | {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def peak(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> int:
    """Bytes that a forward and backward pass take at most."""
    variant = Variant(forward, leaves, grad)
    variant.prepare("full")()
    return peak_bytes(variant, "full", "cpu")


def assert_as_good_as_unfused(got, shape: Shape, tensors: dict[str, Tensor], factor: float = 2.0) -> None:
    """Every result's error against float64 is at most `factor` times that of unfused PyTorch in the same dtype.

    One rounding of the summands to that dtype is allowed in any case: on a handful of elements unfused PyTorch may be
    exact by luck. The summands' size is the same formula over absolute values.
    """
    exact_tensors = upcast(tensors)
    sizes_of = {
        name: tensor.detach().abs().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in exact_tensors.items()
    }
    exact = with_gradients(unfused(shape, exact_tensors), exact_tensors)
    sizes = with_gradients(unfused(shape, sizes_of), sizes_of, absolute=True)
    plain = with_gradients(unfused(shape, tensors), tensors)
    rounding = torch.finfo(tensors["x"].dtype).eps
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.shape == exact[name].shape
        error, unfused_error = ((some.double() - exact[name]).norm().item() for some in (value, plain[name]))
        allowed = max(factor * unfused_error, rounding * sizes[name].norm().item())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
