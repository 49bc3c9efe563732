"""A call of a public operation at random: operands that fit, and how it is held to its definition in float64."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import atp_kernels
from atp_kernels import Projection, QuantizedWeight
from atp_kernels.call import NAMES

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 33, 64, 65, 100)
ROWS = (0, 1, 2, 3, 15, 16, 17, 33, 65, 257, 300)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Draw:
    def __init__(self, draw: random.Random, backend: str | None) -> None:
        self.draw, self.generator = draw, torch.Generator().manual_seed(draw.randrange(2**31))
        few = draw.random() < 0.5 or backend == "triton"
        self.sizes = SIZES[:10] if few else SIZES
        choices = (backend,) if backend else [name for name in NAMES if name != "triton" and _runs(name)]
        self.backend = draw.choice(choices)
        taken = {"native": DTYPES[:2], "triton": DTYPES[:3]}
        self.dtype = draw.choice(taken.get(self.backend, DTYPES))

    def chance(self, share: float = 0.5) -> bool:
        return self.draw.random() < share

    def size(self, least: int = 0) -> int:
        return max(least, self.draw.choice(self.sizes))

    def leading(self) -> list[int]:
        shape = [self.draw.choice(ROWS)]
        if self.chance(0.3):
            shape = self.draw.choice(([], [*shape, 1], [2, shape[0]], [1, 3, 2]))
        return shape

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, learns: bool | None = None) -> Tensor:
        """Values around 1 in any strides, with a gradient or not."""
        values = torch.randn(shape, generator=self.generator)
        if self.dtype == torch.float16:
            values = values / 8  # products of many stay below what it holds
        values = values.to(dtype or self.dtype)
        made = self.laid(values).detach()
        return made.requires_grad_(self.chance() if learns is None else learns)

    def laid(self, values: Tensor) -> Tensor:
        """The values of a tensor in other strides, or one row in place of all of them."""
        way = self.draw.choice(("plain", "turned", "part", "steps", "offset", "expanded", "plain"))
        if way == "plain" or values.ndim == 0:
            return values
        axis = self.draw.randrange(values.ndim)
        if way == "turned":
            return values.transpose(axis, -1).contiguous().transpose(axis, -1)
        if way == "expanded":
            return values.narrow(axis, 0, min(1, values.shape[axis])).expand_as(values) if values.numel() else values
        if way == "steps":
            return values.repeat_interleave(2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]
        before = self.draw.choice((1, 3)) if way == "offset" else 0
        wide = torch.cat([values.new_zeros(*values.shape[:axis], before, *values.shape[axis + 1 :]), values], axis)
        wide = torch.cat([wide, values.new_zeros(*values.shape[:axis], 2, *values.shape[axis + 1 :])], axis)
        return wide.narrow(axis, before, values.shape[axis])

    def flags(self, size: int) -> Tensor:
        """bool [size] in any strides: some, all or none."""
        share = self.draw.choice((0.0, 1.0, 0.5, 0.5, 0.1, 0.9))
        return self.laid(torch.rand(size, generator=self.generator) < share)

    def mask(self, size: int) -> Tensor | None:
        """None, hard, or soft with a gradient or without."""
        kind = self.draw.choice(("none", "hard", "hard", "soft"))
        if kind == "soft":
            dtype = self.draw.choice((torch.float32, self.dtype, torch.float64))
            values = self.laid(torch.rand(size, generator=self.generator).to(dtype))
            return values.detach().requires_grad_(self.chance())
        return None if kind == "none" else self.flags(size)

    def scaling(self) -> float:
        return self.draw.choice((0.0, 1.0, 0.5, -2.0, 0.3))

    def factor_dtype(self) -> torch.dtype:
        """Mostly that of x, else one that is cast to it."""
        return self.dtype if self.chance(0.7) else self.draw.choice(DTYPES)

    def dropout(self) -> tuple[float, Any]:
        p = self.draw.choice((0.0, 0.0, 0.0, 0.25, 0.1, 0.9))
        seed = self.draw.choice((0, 7, -1, 2**63 - 1, -(2**63)))
        return p, self.draw.choice((seed, torch.tensor(seed)))

    def factors(self, n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
        rank, dtype = self.draw.choice((0, 1, 2, 3, 8, 17)), self.factor_dtype()
        return self.tensor(rank, n_in, dtype=dtype), self.tensor(n_out, rank, dtype=dtype)


def _runs(name: str) -> bool:
    return name == "auto" or atp_kernels.available_backends()[name] is None


@dataclass
class Call:
    """function(**given) returns tensors by name, and reference(**given, **frozen) in float64 the same.

    leaves: operands whose gradients are compared. size: how large the sums are that each result is made of, for what
    the definition over absolute values does not say; one number for all entries of a result that is no sum.
    """

    function: Callable[..., Any]
    given: dict[str, Any]
    reference: Callable[..., Any]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Any] = field(default_factory=dict)
    size: Callable[[str], Tensor] | None = None
    largest: bool = False
    dtype: torch.dtype = torch.float32
    grads: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> dict[str, Tensor]:
        """Results, and gradients of the leaves for upstream gradients at random."""
        results = named(self.function(**self.given))
        return results | self._gradients(results, self.leaves)

    def defined(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What `run` must give, and how large its sums are."""
        expected = self._in_float64()
        if self.size is not None:
            return expected, {name: self.size(name) for name in expected}
        sizes = self._in_float64(absolute=True)
        if self.largest:
            sizes = {name: value.abs().max() if value.numel() else value.sum() for name, value in sizes.items()}
        return expected, sizes

    def coarsest(self, value: Tensor) -> torch.dtype:
        """The dtype that rounds most on the way to a value."""
        return max(self.dtype, value.dtype, key=lambda dtype: torch.finfo(dtype).eps)

    def upstream(self, name: str, value: Tensor) -> Tensor:
        if name not in self.grads:
            grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())).to(value.dtype)
            # As often as not it comes from a transposition.
            self.grads[name] = grad.mT.contiguous().mT if grad.ndim > 1 and grad.shape[0] % 2 else grad
        return self.grads[name]

    def _gradients(self, results, leaves, absolute: bool = False) -> dict[str, Tensor]:
        results = {name: value for name, value in results.items() if value.requires_grad}
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if not results or not wanted:
            return {}
        grads = [self.upstream(name, value).to(value.dtype) for name, value in results.items()]
        grads = [grad.abs() for grad in grads] if absolute else grads
        found = torch.autograd.grad(list(results.values()), list(wanted.values()), grads, allow_unused=True)
        return {
            f"gradient of {name}": torch.zeros_like(leaf) if grad is None else grad.detach()
            for (name, leaf), grad in zip(wanted.items(), found, strict=True)
        }

    def _in_float64(self, absolute: bool = False) -> dict[str, Tensor]:
        made: dict[int, Tensor] = {}

        def wide(value):
            if isinstance(value, Tensor) and value.is_floating_point():
                if id(value) not in made:
                    values = value.dequantize() if isinstance(value, QuantizedWeight) else value.detach()
                    values = values.double().abs() if absolute else values.double()
                    made[id(value)] = values.requires_grad_(value.requires_grad)
                return made[id(value)]
            if isinstance(value, Projection):
                return Projection(*map(wide, value))
            if isinstance(value, (list, tuple)):
                return type(value)(map(wide, value))
            return abs(value) if absolute and isinstance(value, float) else value

        operands = self.given | self.frozen
        results = named(self.reference(**{name: wide(value) for name, value in operands.items() if name != "backend"}))
        gradients = self._gradients(results, {name: wide(leaf) for name, leaf in self.leaves.items()}, absolute)
        return {name: value.detach() for name, value in results.items()} | gradients


def named(results: Any) -> dict[str, Tensor]:
    if isinstance(results, Tensor):
        return {"result": results}
    return {f"result {i}": value for i, value in enumerate(results) if value is not None}


def call_of(o: Draw, function, given, reference, leaves=(), **options) -> Call:
    """A call whose leaves are the tensors of `given` with these names, and those of its projections."""
    found = {name: given[name] for name in leaves if given[name] is not None}
    for name, value in given.items():
        if isinstance(value, Projection):
            found |= {f"{name}.{part}": entry for part, entry in value._asdict().items() if isinstance(entry, Tensor)}
    casts = "lora_a" in given or any(isinstance(value, Projection) for value in given.values())
    dtype = o.dtype
    if casts and dtype == torch.float32 and o.backend != "triton" and o.chance(0.15):
        function, dtype = under_autocast(function), torch.bfloat16
    return Call(function, {**given, "backend": o.backend}, reference, found, dtype=dtype, **options)


def under_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a model in bfloat16 calls it; constant adapters are merged into their weights there."""

    def called(**given):
        with torch.autocast("cpu", torch.bfloat16):
            return function(**given)

    return called
