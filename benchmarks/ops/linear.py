"""The masked LoRA linear in its three regimes: decision step, hard masks of the LoRA step, no masks."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from atp_kernels import KeptFirst, KeptSlice, available_backends, explain, kept_lora_linear, masked_lora_linear
from benchmarks.baselines import AddmmLora, unfused
from benchmarks.case import Case, Op, Variant, Variants, Work

_TESTS = tuple(f"tests/atp_kernels/test_{name}.py" for name in ("linear", "linear_triton", "kept", "ops"))
_FLOOR_MULTIPLE = 64  # widths that a vendor GEMM likes


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


def decision(case: Case) -> Variants:
    """Soft mask with gradient over the sum, factors frozen."""
    tensors, grad, rng = operands(case, train_factors=False)
    x, weight, lora_a, lora_b = tensors
    mask = torch.rand(case.linear[0], generator=rng, device=case.device).requires_grad_()

    def ours(backend: str) -> Variant:
        call = partial(masked_lora_linear, *tensors, scaling=1.0, out_mask=mask, mask_lora=True, backend=backend)
        return Variant(call, (x, mask), grad, holds=(tensors, mask))

    return {
        **_marks(case, tensors, (x, mask), grad, {"out_mask": mask, "mask_sum": True}),
        **by_backend("masked_lora_linear", tensors, ours),
        "floor": floor(case, *case.linear),
    }


def hard(case: Case, sides: tuple[str, ...]) -> Variants:
    """Hard masks on the base path, LoRA on the whole width; `ours_dense` masks the whole product.

    `ours` takes and returns activations in the order of the model, `ours_kept_first` in the order that a producer and
    its consumer share, so that nothing is gathered.
    """
    tensors, grad, rng = operands(case, train_factors=True)
    x, weight, lora_a, lora_b = tensors
    sizes = dict(zip(("out_mask", "in_mask"), case.linear, strict=True))
    masks = {name: torch.rand(sizes[name], generator=rng, device=case.device) < case.keep for name in sides}
    inputs = (x, lora_a, lora_b)
    kept = KeptSlice(weight, **masks)
    sliced = partial(kept_lora_linear, x, kept, lora_a, lora_b, scaling=1.0)
    first = KeptSlice(weight, **{name: KeptFirst(mask) for name, mask in masks.items()})
    permuted = partial(kept_lora_linear, x, first, lora_a, lora_b, scaling=1.0)
    padded = (-(-count // _FLOOR_MULTIPLE) * _FLOOR_MULTIPLE for count in _kept(case, sides))
    widths = map(min, case.linear, padded)
    return {
        **_marks(case, tensors, inputs, grad, masks),
        "ours": Variant(sliced, inputs, grad, holds=(tensors, kept)),
        "ours_kept_first": Variant(permuted, inputs, grad, same=False, holds=(tensors, first)),
        "ours_dense": Variant(partial(masked_lora_linear, *tensors, scaling=1.0, **masks), inputs, grad, holds=tensors),
        "floor": floor(case, *widths),
    }


def unmasked(case: Case) -> Variants:
    """LoRA with no mask, as after the cut."""
    tensors, grad, _ = operands(case, train_factors=True)
    inputs = (tensors[0], *tensors[2:])

    def ours(backend: str) -> Variant:
        return Variant(partial(masked_lora_linear, *tensors, scaling=1.0, backend=backend), inputs, grad, holds=tensors)

    return {
        **_marks(case, tensors, inputs, grad, {}),
        **by_backend("masked_lora_linear", tensors, ours),
        "floor": floor(case, *case.linear),
    }


def _marks(
    case: Case, tensors: tuple[Tensor, ...], inputs: tuple[Tensor, ...], grad: Tensor, masks: dict
) -> dict[str, Variant]:
    torch.compiler.reset()  # one graph a case: else shapes of earlier cases make this one dynamic
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
    kept_n, kept_k = _kept(case, sides)
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


def _kept(case: Case, sides: tuple[str, ...]) -> tuple[int, int]:
    n_out, n_in = case.linear
    return (
        round(n_out * case.keep) if "out_mask" in sides else n_out,
        round(n_in * case.keep) if "in_mask" in sides else n_in,
    )


def _hard_op(name: str, *sides: str) -> Op:
    return Op(
        f"linear_hard_{name}",
        build=lambda case: hard(case, sides),
        work=lambda case: linear_work(case, sides),
        parts=lambda model: model.shapes,
        tests=_TESTS,
    )


LINEARS = (
    Op("linear_decision", decision, lambda case: linear_work(case, soft=True), lambda model: model.shapes, _TESTS),
    _hard_op("out", "out_mask"),
    _hard_op("in", "in_mask"),
    _hard_op("both", "out_mask", "in_mask"),
    Op("linear_unmasked", unmasked, linear_work, lambda model: model.shapes, _TESTS),
)
