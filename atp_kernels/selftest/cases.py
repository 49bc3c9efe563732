"""The calls by which an operation is tested, forward and backward, held to its definition in float64.

Runs in a child process. Operands are always the same random numbers, drawn on the CPU for every device.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atp_kernels.call import OPERATIONS, select, shown
from atp_kernels.child import Note
from atp_kernels.compaction import compact
from atp_kernels.compaction import definition as compaction
from atp_kernels.dropout import lora_dropout
from atp_kernels.dropout.definition import Dropout, dropped
from atp_kernels.groups import definition as groups
from atp_kernels.groups import group_lasso, group_lasso_grad_, group_prox_
from atp_kernels.kept import definition as kept
from atp_kernels.kept import kept_lora_linear
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.linear import definition as linear
from atp_kernels.linear import masked_lora_linear
from atp_kernels.loss import cross_entropy_
from atp_kernels.loss import definition as loss
from atp_kernels.mask_gradient import definition as of_mask
from atp_kernels.mask_gradient import mask_gradient
from atp_kernels.norm import add_rms_norm, rms_norm
from atp_kernels.norm import definition as norm
from atp_kernels.projection import Projection
from atp_kernels.qkv import definition as qkv
from atp_kernels.qkv import masked_lora_qkv
from atp_kernels.rotary import definition as rotary
from atp_kernels.rotary import rotary_embedding
from atp_kernels.swiglu import definition as swiglu
from atp_kernels.swiglu import masked_lora_swiglu

ALLOWED = 4.0
"""A backend may be this many times as far from float64 as its definition in the same dtype is."""
ROUNDINGS = 4.0
"""Or as far as so many roundings of the whole result, where the definition happens to be nearer."""
DTYPES = (torch.float32, torch.bfloat16)
DROPOUT = 0.25
SEED = 2**40 + 3  # both halves count
SCALING = 0.5
_EPS = 1e-6
_NOTHING = 1e-300  # to divide an error by where the bound is zero, as that of zeros

Operands = dict[str, Tensor]
Results = tuple[Tensor, ...]


class Sizes(NamedTuple):
    """Rows, outputs, inputs and rank of a linear; other operations take theirs from these."""

    m: int
    n: int
    k: int
    r: int


SIZES = (Sizes(5, 19, 21, 3), Sizes(256, 768, 576, 8))
"""A small odd one, and one like a step of a small model."""


class Case(NamedTuple):
    """A way to call an operation. shapes: of its operands, whose names say what they hold (`_drawn`).

    call: the operation as a run calls it. definition: the same in plain PyTorch. learn: what has a gradient.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[[Operands], Results]
    definition: Callable[[Operands], Results]
    learn: tuple[str, ...] = ()


def tested(job: dict[str, str], note: Note) -> dict[str, Any]:
    """Test an operation: {"op", "device"} to its backend, the first problem, the largest error over its bound, seconds.

    {"unchecked"} where the device has no memory for it.
    """
    device, started, largest = torch.device(job["device"]), time.perf_counter(), 0.0
    backend, problem = select(job["op"], device, DTYPES[-1]).name, None
    try:
        for sizes in SIZES:
            for case in CASES[job["op"]](sizes):
                for dtype in DTYPES:
                    what = f"{case.name} in {shown(dtype)}, {sizes.m} rows"
                    note(what)
                    part, error, allowed = _worst(case, dtype, device)
                    largest = max(largest, error / allowed)
                    if not error <= allowed:
                        problem = f"{what}: {part} is {error:.1e} from float64, where {allowed:.1e} is allowed"
                        return _outcome(backend, problem, error / allowed, started)
    except torch.OutOfMemoryError:
        return {"unchecked": f"there is no memory for {job['op']} on {device}"}
    return _outcome(backend, problem, largest, started)


def begun(job: dict[str, str], note: Note) -> list[str]:
    """Begin work on a device; which operations there are to test."""
    float(torch.ones((), device=job["device"]))
    return list(OPERATIONS)


def served(job: dict[str, str], note: Note) -> Any:
    """What a job asks for: `tested` of its operation, without one `begun`."""
    if torch.device(job["device"]).type == "cuda":
        torch.cuda.set_device(job["device"])
    return tested(job, note) if "op" in job else begun(job, note)


def _outcome(backend: str, problem: str | None, error: float, started: float) -> dict[str, Any]:
    known = error if error < float("inf") else None
    return {"backend": backend, "problem": problem, "error": known, "seconds": time.perf_counter() - started}


def _worst(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[str, float, float]:
    """(part, distance from float64, what is allowed) of the result or gradient that is the worst of a call."""
    found = _computed(case, case.call, _drawn(case, dtype, device))
    rough = _computed(case, case.definition, _drawn(case, dtype, device))
    exact = _computed(case, case.definition, _wide(_drawn(case, dtype, device)))
    worst = ("", 0.0, 1.0)
    for part, value in exact.items():
        if found[part].shape != value.shape:
            return part, float("nan"), 1.0
        error = _distance(found[part], value)
        floor = ROUNDINGS * torch.finfo(dtype).eps * float(value.norm())
        allowed = max(ALLOWED * _distance(rough[part], value), floor) or _NOTHING
        if not error / allowed <= worst[1] / worst[2]:
            worst = (part, error, allowed)
        if error != error:
            break
    return worst


def _computed(case: Case, function: Callable[[Operands], Results], operands: Operands) -> dict[str, Tensor]:
    """What a function makes of operands, and the gradients for fixed upstream ones."""
    leaves = {name: operands[name].requires_grad_() for name in case.learn}
    results = function(operands)
    found = {f"result {i}": result.detach() for i, result in enumerate(results)}
    if leaves:
        rng = torch.Generator().manual_seed(1)
        upstream = [torch.randn(result.shape, generator=rng).to(result) for result in results]
        grads = torch.autograd.grad(results, list(leaves.values()), upstream)
        found |= {f"the gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def _drawn(case: Case, dtype: torch.dtype, device: torch.device) -> Operands:
    """Random operands: masks by "hard" and "soft" in their names, angles, indices and factors by theirs."""
    rng, made = torch.Generator().manual_seed(0), {}
    for name, shape in case.shapes.items():
        if "hard" in name or name == "removed":
            made[name] = torch.rand(shape, generator=rng) < 0.6
        elif "soft" in name or name == "threshold":
            made[name] = torch.rand(shape, generator=rng)
        elif name in ("cos", "sin"):
            made[name] = torch.randn(shape, generator=rng).clamp(-1, 1)
        elif name == "targets":
            made[name] = torch.randint(case.shapes["logits"][1], shape, generator=rng)
        elif "index" in name:
            made[name] = torch.arange(shape[0]) * 2 % 5
        else:
            share = shape[-1] ** 0.5 if name.endswith(("weight", "_a")) else 1.0
            made[name] = (torch.randn(shape, generator=rng) / share).to(dtype)
    return {name: tensor.to(device) for name, tensor in made.items()}


def _wide(operands: Operands) -> Operands:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in operands.items()}


def _distance(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm())


def _linear(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    m, n, k, r = sizes
    return {"x": (m, k), "weight": (n, k), "lora_a": (r, k), "lora_b": (n, r), "bias": (n,)}


def _factors(t: Operands) -> list[Tensor]:
    return [t[name] for name in ("x", "weight", "lora_a", "lora_b")]


def _linears(sizes: Sizes) -> Iterator[Case]:
    """The steps of a run: deciding, searching with dropout, and tuning after the cut."""
    shapes, learn = _linear(sizes), ("x", "lora_a", "lora_b")
    masked = shapes | {"soft_out": (sizes.n,), "soft_in": (sizes.k,)}
    hard = shapes | {"hard_out": (sizes.n,), "hard_in": (sizes.k,)}
    drops = {"dropout": DROPOUT, "seed": SEED}

    def call(t: Operands, kind: str, options: dict[str, Any], function: Callable[..., Tensor]) -> Results:
        masks = {f"{side}_mask": t[f"{kind}_{side}"] for side in ("out", "in")} if kind else {}
        return (function(*_factors(t), bias=t["bias"], scaling=SCALING, **masks, **options),)

    for name, kind, given, options, defined, more in (
        ("soft masks", "soft", masked, {"mask_lora": True}, {"mask_lora": True}, ("soft_out", "soft_in")),
        ("hard masks", "hard", hard, drops, {"dropout": Dropout(DROPOUT, SEED)}, ()),
        ("no masks", "", shapes, {}, {}, ()),
    ):
        yield Case(
            name,
            given,
            partial(call, kind=kind, options=options, function=masked_lora_linear),
            partial(call, kind=kind, options=defined, function=linear.masked_lora_linear),
            (*learn, *more),
        )


def _kept_linears(sizes: Sizes) -> Iterator[Case]:
    def call(t: Operands) -> Results:
        slice_ = KeptSlice(t["weight"], t["bias"], out_mask=t["hard_out"], in_mask=t["hard_in"])
        return (kept_lora_linear(t["x"], slice_, t["lora_a"], t["lora_b"], scaling=SCALING),)

    def defined(t: Operands) -> Results:
        masks: dict[str, Any] = {"out_mask": t["hard_out"], "in_mask": t["hard_in"]}
        return (kept.kept_lora_linear(*_factors(t), scaling=SCALING, bias=t["bias"], **masks),)

    shapes = _linear(sizes) | {"hard_out": (sizes.n,), "hard_in": (sizes.k,)}
    yield Case("hard masks", shapes, call, defined, ("x", "lora_a", "lora_b"))


def _projections(t: Operands, names: Sequence[str]) -> list[Projection]:
    parts = ("weight", "a", "b", "bias")
    named = ([t[f"{name}_{part}"] for part in parts] for name in names)
    return [Projection(weight, a, b, SCALING, bias) for weight, a, b, bias in named]


def _shapes_of(sizes: dict[str, tuple[int, int]], r: int) -> dict[str, tuple[int, ...]]:
    """Of linears out x in, by their names."""
    return {
        f"{name}_{part}": shape
        for name, (n, k) in sizes.items()
        for part, shape in {"weight": (n, k), "a": (r, k), "b": (n, r), "bias": (n,)}.items()
    }


def _qkvs(sizes: Sizes) -> Iterator[Case]:
    names = ("q", "k", "v")
    shapes = {"x": (sizes.m, sizes.k)} | _shapes_of(
        {name: (sizes.n // part, sizes.k) for name, part in zip(names, (1, 3, 3), strict=True)}, sizes.r
    )
    learn = ("x", *(f"{name}_{part}" for name in names for part in "ab"))
    for name, masked in (("soft mask", {"soft_q": (sizes.n,)}), ("no masks", {})):
        yield Case(
            name,
            shapes | masked,
            lambda t: masked_lora_qkv(t["x"], *_projections(t, names), masks=(t.get("soft_q"), None, None)),
            lambda t: qkv.masked_lora_qkv(t["x"], *_projections(t, names), masks=(t.get("soft_q"), None, None)),
            (*learn, *masked),
        )


def _mlps(sizes: Sizes) -> Iterator[Case]:
    m, n, k, r = sizes
    names = ("gate", "up", "down")
    shapes = {"x": (m, k)} | _shapes_of({"gate": (n, k), "up": (n, k), "down": (k, n)}, r)
    learn = ("x", *(f"{name}_{part}" for name in names for part in "ab"))

    def call(t: Operands, function: Callable[..., Tensor], mask_lora: bool) -> Results:
        mask = t.get("soft", t.get("hard"))
        return (function(t["x"], *_projections(t, names), mask=mask, mask_lora=mask_lora),)

    for name, masked, mask_lora, more in (
        ("soft mask", {"soft": (n,)}, True, ("soft",)),
        ("hard mask", {"hard": (n,)}, False, ()),
        ("no mask", {}, False, ()),
    ):
        yield Case(
            name,
            shapes | masked,
            partial(call, function=masked_lora_swiglu, mask_lora=mask_lora),
            partial(call, function=swiglu.masked_lora_swiglu, mask_lora=mask_lora),
            (*learn, *more),
        )
    observed = shapes | {"x": (1, m, k), "upstream": (1, m, k)}
    yield Case("observed", observed, partial(_observed_mlp, names=names), partial(_mask_of_mlp, names=names))


def _observed_mlp(t: Operands, names: Sequence[str]) -> Results:
    """The gradient of a mask that nobody applies."""
    sums = t["x"].new_zeros(1, len(t["gate_weight"]), dtype=torch.float32)
    y = masked_lora_swiglu(t["x"].requires_grad_(), *_projections(t, names), mask_grad=sums)
    y.backward(t["upstream"])
    return (sums[0],)


def _mask_of_mlp(t: Operands, names: Sequence[str]) -> Results:
    mask = torch.ones_like(t["gate_weight"][:, 0]).requires_grad_()
    y = swiglu.masked_lora_swiglu(t["x"], *_projections(t, names), mask=mask, mask_lora=True)
    return torch.autograd.grad(y, mask, t["upstream"])


def _mask_gradients(sizes: Sizes) -> Iterator[Case]:
    def call(t: Operands) -> Results:
        sums = t["y"].new_zeros(2, sizes.n, dtype=torch.float32)
        mask_gradient(t["y"].requires_grad_(), sums).backward(t["upstream"])
        return (sums,)

    def defined(t: Operands) -> Results:
        mask = torch.ones_like(t["y"][:, 0]).requires_grad_()
        return torch.autograd.grad(of_mask.masked(t["y"], mask), mask, t["upstream"])

    yield Case("observed", dict.fromkeys(("y", "upstream"), (2, sizes.m, sizes.n)), call, defined)


def _dropouts(sizes: Sizes) -> Iterator[Case]:
    yield Case(
        "dropout",
        {"x": (sizes.m, sizes.k)},
        lambda t: (lora_dropout(t["x"], DROPOUT, SEED),),
        lambda t: (dropped(t["x"], Dropout(DROPOUT, SEED)),),
        ("x",),
    )


def _norms(sizes: Sizes) -> Iterator[Case]:
    yield Case(
        "norm",
        {"x": (sizes.m, sizes.k), "weight": (sizes.k,)},
        lambda t: (rms_norm(t["x"], t["weight"], eps=_EPS),),
        lambda t: (norm.rms_norm(t["x"], t["weight"], _EPS),),
        ("x", "weight"),
    )


def _sums_and_norms(sizes: Sizes) -> Iterator[Case]:
    """As residual connections of Llama and of Granite."""

    def call(t: Operands, function: Callable[..., tuple[Tensor, Tensor]], multiplier: float) -> Results:
        return function(t["x"], t["output"], t["weight"], eps=_EPS, multiplier=multiplier)

    shapes: dict[str, tuple[int, ...]] = {"x": (sizes.m, sizes.k), "output": (sizes.m, sizes.k), "weight": (sizes.k,)}
    for name, multiplier in (("sum", 1.0), ("scaled", 0.22)):
        yield Case(
            name,
            shapes,
            partial(call, function=add_rms_norm, multiplier=multiplier),
            partial(call, function=norm.add_rms_norm, multiplier=multiplier),
            ("x", "output", "weight"),
        )


def _rotations(sizes: Sizes) -> Iterator[Case]:
    tokens = sizes.m
    whole = {"q": (2, tokens, 4, 64), "k": (2, tokens, 2, 64), "cos": (1, tokens, 64), "sin": (1, tokens, 64)}
    part = {"q": (1, tokens, 3, 4), "k": (1, tokens, 1, 4), "cos": (1, tokens, 6), "sin": (1, tokens, 6), "index": (4,)}

    def call(t: Operands, function: Callable[..., tuple[Tensor, Tensor]], width: int) -> Results:
        return function(t["q"], t["k"], t["cos"], t["sin"], index=t.get("index"), width=width)

    for name, shapes, width in (("whole heads", whole, 64), ("cut heads", part, 8)):
        yield Case(
            name,
            shapes,
            partial(call, function=rotary_embedding, width=width),
            partial(call, function=rotary.rotary_embedding, width=width),
            ("q", "k"),
        )


def _losses(sizes: Sizes) -> Iterator[Case]:
    def call(t: Operands, function: Callable[[Tensor, Tensor], Tensor]) -> Results:
        return function(t["logits"], t["targets"]), t["logits"]

    shapes: dict[str, tuple[int, ...]] = {"logits": (sizes.m, 7 * sizes.n), "targets": (sizes.m,)}
    yield Case("loss", shapes, partial(call, function=cross_entropy_), partial(call, function=loss.cross_entropy_))


def _compactions(sizes: Sizes) -> Iterator[Case]:
    def call(t: Operands, function: Callable[..., Tensor]) -> Results:
        rows, cols = (t[f"hard_{side}"].nonzero().squeeze(1) for side in ("out", "in"))
        return (function(t["weight"], rows, cols, pad_to=8),)

    shapes: dict[str, tuple[int, ...]] = {
        "weight": (sizes.n, sizes.k), "hard_out": (sizes.n,), "hard_in": (sizes.k,)
    }  # fmt: skip
    yield Case("both sides", shapes, partial(call, function=compact), partial(call, function=compaction.compact))


def _grouped(t: Operands) -> tuple[list[Tensor], list[tuple[int, Tensor]]]:
    """Factors with groups of rows of one and columns of the other in common."""
    return [t["first"], t["second"]], [(0, t["first_index"]), (1, t["second_index"])]


def _group_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    n, r = sizes.n, sizes.r
    return {"first": (n, r), "second": (r, n + 2), "first_index": (n,), "second_index": (n + 2,), "removed": (5,)}


def _lassos(sizes: Sizes) -> Iterator[Case]:
    yield Case(
        "penalty",
        _group_shapes(sizes),
        lambda t: (group_lasso(*_grouped(t), t["removed"]),),
        lambda t: (groups.group_lasso(*_grouped(t), t["removed"]),),
        ("first", "second"),
    )


def _lasso_gradients(sizes: Sizes) -> Iterator[Case]:
    def call(t: Operands) -> Results:
        factors, index = _grouped(t)
        for factor, before in zip(factors, ("first_before", "second_before"), strict=True):
            factor.requires_grad_().grad = t[before]
        value = group_lasso_grad_(factors, index, t["removed"], weight=SCALING)
        return value, t["first_before"], t["second_before"]

    def defined(t: Operands) -> Results:
        factors, index = _grouped(t)
        value = groups.group_lasso([factor.requires_grad_() for factor in factors], index, t["removed"])
        first, second = torch.autograd.grad(SCALING * value, factors)
        return value, t["first_before"] + first, t["second_before"] + second

    shapes = _group_shapes(sizes)
    yield Case(
        "gradient in place",
        shapes | {"first_before": shapes["first"], "second_before": shapes["second"]},
        call,
        defined,
    )


def _proximal_steps(sizes: Sizes) -> Iterator[Case]:
    def call(t: Operands, function: Callable[..., None]) -> Results:
        factors, index = _grouped(t)
        function(factors, index, t["removed"], t["threshold"])
        return t["first"], t["second"]

    shapes = _group_shapes(sizes) | {"threshold": (5,)}
    yield Case("step", shapes, partial(call, function=group_prox_), partial(call, function=groups.group_prox_))


CASES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "masked_lora_linear": _linears,
    "masked_lora_qkv": _qkvs,
    "masked_lora_swiglu": _mlps,
    "kept_lora_linear": _kept_linears,
    "mask_gradient": _mask_gradients,
    "lora_dropout": _dropouts,
    "rms_norm": _norms,
    "add_rms_norm": _sums_and_norms,
    "rotary_embedding": _rotations,
    "cross_entropy_": _losses,
    "compact": _compactions,
    "group_lasso": _lassos,
    "group_lasso_grad_": _lasso_gradients,
    "group_prox_": _proximal_steps,
}
"""Of every registered operation."""
