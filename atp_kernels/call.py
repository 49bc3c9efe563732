"""Which backend takes a call, and why: the one place where rooms ask, and what `explain` tells.

An operation is a room, a package in here:

    __init__.py    the public function: docstring, checks, casts
    definition.py  the mathematics in plain PyTorch, which every backend is held to
    op.py          `OPERATION` with the order of its backends, torch.library schema and fake, autograd, eager Function
    aten.py        the `reference` backend: ATen calls, on any device and dtype
    native.py      the `native` backend: C++ of the extension (csrc/)
    triton.py      the `triton` backend
    README.md      formula, what is saved, gradients, FLOPs, bytes, backends, tiles
    bench.py       its benchmark cases (`OPS`); benchmarks/registry.py collects them
    mutants.py     its broken lines (`TABLE`); tests/mutants collects them. Neither is imported by the package.

A backend is a module with the functions of its room's aten.py under the same names and signatures, and with
`supports(call)`: None, or why it cannot take the call. It is imported when a call first asks for it.
"""

import importlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, wraps
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atp_kernels.kinds import typed

ENVIRONMENT = "ATP_KERNELS_BACKEND"

_FILES = {"reference": "aten", "triton": "triton", "native": "native"}
_RUNTIMES = {"triton": "atp_kernels.triton_runtime", "native": "atp_kernels.extension"}
NAMES = ("auto", *_FILES)

CACHED_ELEMENTS = 2**17
"""What stays in a CPU's cache between two passes over it."""


class Call(NamedTuple):
    """What decides which backend takes a call.

    dtype: that of x, or the rarest of the factors'. plain: a LoRA linear without masks and dropout. result: the dtype
    that is asked for, None for that of the operands.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    plain: bool = False
    result: torch.dtype | None = None


class Choice(NamedTuple):
    """The backend of a call: its module and public name, and why it was taken."""

    module: ModuleType
    name: str
    why: str


@dataclass(frozen=True)
class Order:
    """Backends in the order in which "auto" asks them, and why the first of them comes first."""

    backends: tuple[str, ...]
    why: str | None = None


@dataclass(frozen=True)
class Operation:
    """An operation as `select` knows it.

    package: its room. backends: those that have a file there. order: by device type, or "<device type> plain" for plain
    calls that have an order of their own; devices that are not named take the reference. explained: (tensors, backend,
    **the call's keyword arguments) to (way, why), for a linear in which sizes and masks decide too; explained_by: how
    many tensors that takes, x first and the factors last. computed_by: the operation for which calls of this one ask
    `select`, where it is another; one that is set aside sets the other aside.
    """

    name: str
    package: str
    backends: tuple[str, ...]
    order: Mapping[str, Order] = field(default_factory=dict)
    explained: Callable[..., tuple[str, str]] | None = None
    explained_by: int = 4
    computed_by: str | None = None

    def order_of(self, call: Call) -> Order:
        """The order for a call."""
        place = call.device.type
        keys = (f"{place} plain", place) if call.plain else (place,)
        return next((self.order[key] for key in keys if key in self.order), Order(("reference",)))

    def load(self, name: str) -> tuple[ModuleType | None, str | None]:
        """(a backend of this room, None) or (None, why there is none here)."""
        if name not in self.backends:
            return None, f"the {name} backend does not implement {self.name}"
        reason = _missing(name)
        return (None, reason) if reason else (importlib.import_module(f"{self.package}.{_FILES[name]}"), None)


OPERATIONS: dict[str, Operation] = {}
_SET_ASIDE: dict[tuple[str, str], str] = {}  # (operation, device type) -> why "auto" takes the reference there


def register(operation: Operation) -> Operation:
    """Make an operation known to `select` and `explain`; its room does so when it is imported."""
    OPERATIONS[operation.name] = operation
    return operation


def set_aside(device_type: str, reasons: Mapping[str, str]) -> None:
    """Make "auto" take the reference of these operations, and of no others, on such devices in this process.

    A backend that `backend=` or the environment names is taken as before.
    """
    for key in [key for key in _SET_ASIDE if key[1] == device_type]:
        del _SET_ASIDE[key]
    for op, why in reasons.items():
        _SET_ASIDE.setdefault((_computed_by(op), device_type), why)
    _select.cache_clear()


def why_aside(op: str, device_type: str) -> str | None:
    """Why "auto" takes no backend but the reference; None where it may."""
    return _SET_ASIDE.get((_computed_by(op), device_type))


def _computed_by(op: str) -> str:
    return OPERATIONS[op].computed_by or op


def select(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    *,
    plain: bool = False,
    result: torch.dtype | None = None,
) -> Choice:
    """The backend of a call, whose parts are those of `Call`.

    Raises ValueError for an unknown name, RuntimeError for a named backend that cannot take the call.
    """
    return _select(op, device, dtype, backend, override(), plain, result)


@cache
def override() -> str:
    """What the environment says in place of "auto", read once: looking up a name that is not there takes 1 us.

    A process that changes the variable after its first call says so with `override.cache_clear()`.
    """
    return os.environ.get(ENVIRONMENT, "")


# Positional, and a Call only where the answer is new: hundreds of calls per step find theirs in the cache.
@cache
def _select(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    override: str,
    plain: bool,
    result: torch.dtype | None,
) -> Choice:
    if op not in OPERATIONS:
        raise ValueError(f"unknown operation {op!r}: use one of {', '.join(OPERATIONS)}.")
    if dtype.is_floating_point and dtype.itemsize < 2 and op != "compact":
        raise ValueError(f"{op} does not compute in {shown(dtype)}: cast the operands, or make a QuantizedWeight.")
    operation, call = OPERATIONS[op], Call(op, device, dtype, plain, result)
    origin = "backend="
    if backend == "auto" and override:
        backend, origin = override, f"{ENVIRONMENT}="
    if backend not in NAMES:
        raise ValueError(f"{origin}{backend!r} is not a backend: use one of {', '.join(NAMES)}.")
    if backend != "auto":
        module, problem = _ask(operation, backend, call)
        if module is None:
            raise RuntimeError(f"{origin}{backend!r} cannot take {op}: {problem}; use backend='auto' to let it choose.")
        return Choice(module, backend, f"{origin}{backend!r} names it")
    order = operation.order_of(call)
    passed_over: list[str] = []
    aside = why_aside(op, device.type)
    for name in order.backends:
        if aside is not None and name != "reference":
            passed_over = [aside]
            continue
        module, problem = _ask(operation, name, call)
        if module is not None:
            why = "; ".join(passed_over) or order.why or f"first choice on {device.type}"
            return Choice(module, name, why)
        passed_over.append(f"{name}: {problem}")
    raise RuntimeError(f"no backend takes {op} on {device.type}: {'; '.join(passed_over)}.")


def _ask(operation: Operation, name: str, call: Call) -> tuple[ModuleType | None, str | None]:
    """(the backend, None) or (None, why it cannot take the call)."""
    module, reason = operation.load(name)
    problem = reason if module is None else module.supports(call)
    return (module, None) if problem is None else (None, problem)


def _missing(name: str) -> str | None:
    """Why a backend cannot run here at all, whatever the device."""
    return importlib.import_module(_RUNTIMES[name]).REASON if name in _RUNTIMES else None


@typed
def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend's name, with None where it can run here, or on this device, and else the reason why not.

    >>> available_backends()["reference"] is None  # it runs anywhere
    True
    """
    found = {name: _missing(name) for name in _FILES}
    if device is None:
        return found
    place = torch.device(device)
    return {
        name: reason or (importlib.import_module(_RUNTIMES[name]).misfit(place) if name in _RUNTIMES else None)
        for name, reason in found.items()
    }


@typed
def explain(op: str, *tensors: Tensor, backend: str = "auto", plain: bool = False, **options: Any) -> str:
    """One sentence on how a call of `op` on tensors like these is computed, and why.

    The first tensor's device and the tensors' common dtype decide; with none given a float32 CPU call is explained.
    `plain`: of a masked LoRA linear, a call with neither masks nor dropout.
    With x, weight, lora_a and lora_b of `masked_lora_linear`, and its bias, lora_input, masks, mask_lora and dropout as
    options, the sentence is about that call: which way, from which tuned table, for its M, N, K and r. So it is with
    x, lora_a and lora_b of `kept_lora_linear`, and its slice as the option kept.

    >>> explain("compact", torch.ones(2, 3), backend="reference")
    "compact on cpu in float32 runs on reference (backend='reference' names it)."
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = common_dtype(tensors) if tensors else torch.float32
    operation = OPERATIONS.get(op)
    if operation is not None and operation.explained is not None and len(tensors) == operation.explained_by:
        x, *_, lora_a, lora_b = tensors
        name, why = operation.explained(tensors, backend, **options)
        (r, k), n, dtype = lora_a.shape, lora_b.shape[0], autocast_dtype(x) or x.dtype
        sizes = f" with M {x.numel() // max(1, k)}, N {n}, K {k}, r {r}"
    elif options:
        raise ValueError(f"{', '.join(options)} explain nothing without x, weight, lora_a and lora_b of a linear.")
    else:
        _, name, why = select(op, device, dtype, backend, plain=plain)
        sizes = ""
    return f"{op} on {device.type} in {shown(dtype)}{sizes} runs on {name} ({why})."


def refused_dtype(name: str, dtype: torch.dtype, accepted: Sequence[torch.dtype]) -> str | None:
    """Why a backend that takes these dtypes does not take this one, None where it does."""
    if dtype in accepted:
        return None
    return f"the {name} backend takes {', '.join(map(shown, accepted))}, not {shown(dtype)}"


def shown(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def common_dtype(factors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that decides the backend: the one among the factors' that the fewest backends take."""
    return rarest_dtype(set(map(attrgetter("dtype"), factors)))


def rarest_dtype(present: Collection[torch.dtype]) -> torch.dtype:
    """`common_dtype` of factors that have these dtypes."""
    rare_first = (torch.float64, torch.float16, torch.float32, torch.bfloat16)
    return next((dtype for dtype in rare_first if dtype in present), next(iter(present)))


def matrix(tensor: Tensor) -> Tensor:
    """The tensor as rows of its last dimension."""
    # Not even a view where nothing changes: eager code makes hundreds of calls per step.
    if tensor.ndim == 2:
        return tensor
    return tensor.flatten(0, -2) if tensor.ndim > 2 else tensor.unsqueeze(0)  # unlike a -1, fit for a width of zero


def unflattened(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows [n, width], which a Function returns, for an x of this shape: [*shape[:-1], width].

    Of a view that is made in a Function autograd refuses changes in place; the result of a linear may be changed.
    """
    return rows if len(shape) == 2 else rows.view(*shape[:-1], rows.shape[-1]).detach()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts x and what it is multiplied by, None where it casts nothing."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):  # meta knows no autocast
        return None
    return torch.get_autocast_dtype(device)


def refuse_twice(ctx, *grads):
    """The backward of every backward."""
    raise RuntimeError("atp_kernels operations can be differentiated once: drop create_graph=True for them.")


def differentiable_once(backward):
    """Decorates the backward pass of a Function: a backward pass through what it returns raises.

    torch's `once_differentiable` takes a gradient for a constant where the upstream one is, as that of a sum, though
    it depends on the operands: a penalty on it would do nothing, and nothing would say so.
    """
    refusing = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx, *grads):
        if not torch.is_grad_enabled():  # as in every backward pass without create_graph=True
            return backward(ctx, *grads)
        grads = [grad if grad is None or grad.requires_grad else grad.detach().requires_grad_() for grad in grads]
        return refusing(ctx, *grads)

    return checked
