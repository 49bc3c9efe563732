"""Each public operation of atp_kernels with operands at random, and its definition."""

from collections.abc import Callable
from typing import Any

import torch
from kernel_calls import DTYPES, ROWS, Call, Draw, call_of
from torch import Tensor

import atp_kernels
from atp_kernels import GroupPlan, KeptFirst, KeptSlice, Projection, QuantizedWeight
from atp_kernels.call import matrix
from atp_kernels.compaction import definition as compaction
from atp_kernels.dropout.definition import Dropout, dropped
from atp_kernels.groups import definition as groups
from atp_kernels.linear import definition as linear
from atp_kernels.loss import definition as loss
from atp_kernels.norm import definition as norm
from atp_kernels.rotary import definition as rotary
from atp_kernels.swiglu import definition as swiglu


def draw_linear(o: Draw) -> Call:
    n_out, n_in, rows = o.size(), o.size(), o.leading()
    if o.chance(0.03):  # where a CPU may slice per call
        n_out, n_in, rows = 700, 1100, [700]
    lora_a, lora_b = o.factors(n_out, n_in)
    p, seed = o.dropout()
    given = {
        "x": o.tensor(*rows, n_in), "weight": o.tensor(n_out, n_in, learns=o.chance(0.3)), "lora_a": lora_a,
        "lora_b": lora_b, "scaling": o.scaling(), "out_mask": o.mask(n_out), "in_mask": o.mask(n_in),
        "mask_lora": o.chance(), "bias": o.tensor(n_out, dtype=o.factor_dtype()) if o.chance() else None,
        "lora_input": o.tensor(*rows, n_in) if p == 0 and o.chance(0.3) else None, "dropout": p, "seed": seed,
    }  # fmt: skip

    def reference(dropout, seed, **operands):
        drop = Dropout(dropout, int(seed)) if dropout else None
        return linear.masked_lora_linear(**operands, dropout=drop)

    leaves = ("x", "weight", "lora_a", "lora_b", "bias", "lora_input", "out_mask", "in_mask")
    return call_of(o, atp_kernels.masked_lora_linear, given, reference, leaves)


def frozen(o: Draw, n_out: int, n_in: int) -> Tensor:
    """A weight of a slice, which may be quantised."""
    weight = o.tensor(n_out, n_in, learns=False)
    if o.dtype != torch.float64 and weight.numel() and o.chance(0.15):
        return o.draw.choice((QuantizedWeight.int8, QuantizedWeight.fp8))(weight)
    return weight


def draw_kept(o: Draw) -> Call:
    n_out, n_in, rows = o.size(), o.size(), o.leading()
    lora_a, lora_b = o.factors(n_out, n_in)
    p, seed = o.dropout()
    masks = [o.flags(size) if o.chance(0.7) else None for size in (n_out, n_in)]
    pad = o.draw.choice((1, 2, 3, 8, 32))
    outs, ins = (KeptFirst(mask, pad_to=pad) if mask is not None and o.chance(0.4) else mask for mask in masks)
    weights = {"weight": frozen(o, n_out, n_in), "bias": o.tensor(n_out, learns=False) if o.chance() else None}
    kept = KeptSlice(**weights, out_mask=outs, in_mask=ins, pad_to=pad)
    given = {
        "x": o.tensor(*rows, n_in), "kept": kept.zeroed if o.chance(0.1) else kept, "lora_a": lora_a, "lora_b": lora_b,
        "scaling": o.scaling(), "lora_input": o.tensor(*rows, n_in) if p == 0 and o.chance(0.3) else None,
        "dropout": p, "seed": seed,
    }  # fmt: skip

    def reference(x, kept, dropout, seed, lora_input, **operands):
        if dropout:
            lora_input = dropped(matrix(x), Dropout(dropout, int(seed))).view(x.shape)
        if isinstance(ins, KeptFirst):
            x, lora_input = (None if values is None else values[..., ins.place] for values in (x, lora_input))
        y = linear.masked_lora_linear(x, **operands, lora_input=lora_input, out_mask=masks[0], in_mask=masks[1])
        return y[..., outs.index] if isinstance(outs, KeptFirst) else y

    leaves = ("x", "lora_a", "lora_b", "lora_input")
    return call_of(o, atp_kernels.kept_lora_linear, given, reference, leaves, frozen=weights)


def projection(o: Draw, n_out: int, n_in: int, sliced: bool = False) -> Projection:
    bias = o.tensor(n_out, learns=False if sliced else None) if o.chance() else None
    weight = frozen(o, n_out, n_in) if sliced else o.tensor(n_out, n_in, learns=o.chance(0.3))
    return Projection(weight, *o.factors(n_out, n_in), o.scaling(), bias)


def draw_qkv(o: Draw) -> Call:
    n_in, sliced = o.size(), o.chance(0.3)
    linears = [projection(o, o.size(), n_in, sliced) for _ in range(3)]
    masks = tuple(o.flags(len(one.weight)) if sliced else o.mask(len(one.weight)) for one in linears)
    masks = (None,) * 3 if not sliced and o.chance(0.3) else masks
    p, seed = o.dropout()
    kept = None
    if sliced:
        kept = tuple(KeptSlice(one.weight, one.bias, out_mask=mask) for one, mask in zip(linears, masks, strict=True))
    given = {
        "x": o.tensor(*o.leading(), n_in), **dict(zip("qkv", linears, strict=True)),
        "masks": (None,) * 3 if sliced else masks, "mask_lora": not sliced and o.chance(), "kept": kept, "dropout": p,
        "seed": seed,
    }  # fmt: skip

    def reference(x, q, k, v, mask_lora, dropout, seed, masks, **_):
        drop = Dropout(dropout, int(seed)) if dropout else None
        return [
            linear.masked_lora_linear(
                x, *one[:3], scaling=one.scaling, bias=one.bias, out_mask=mask, mask_lora=mask_lora, dropout=drop
            )
            for one, mask in zip((q, k, v), masks, strict=True)
        ]

    call = call_of(o, atp_kernels.masked_lora_qkv, given, reference, ("x",), frozen={"masks": masks})
    call.leaves |= {f"mask {i}": mask for i, mask in enumerate(given["masks"]) if mask is not None}
    return call


def draw_swiglu(o: Draw) -> Call:
    hidden, channels, n_out, sliced = o.size(), o.size(), o.size(), o.chance(0.3)
    shapes = {"gate": (channels, hidden), "up": (channels, hidden), "down": (n_out, channels)}
    linears = {name: projection(o, *shape, sliced) for name, shape in shapes.items()}
    mask, kept = o.flags(channels) if sliced else o.mask(channels), None
    if sliced:
        shared = KeptFirst(mask) if o.chance() else mask
        sides = {"gate": "out_mask", "up": "out_mask", "down": "in_mask"}
        kept = tuple(KeptSlice(one.weight, one.bias, **{sides[name]: shared}) for name, one in linears.items())
    first = sliced and isinstance(shared, KeptFirst)
    p, seed = (0.0, None) if first else o.dropout()  # it is drawn over the channels as they lie
    given = {
        "x": o.tensor(*o.leading(), hidden), **linears, "activation": o.draw.choice(("silu", "gelu_tanh")),
        "mask": None if sliced else mask, "mask_lora": not sliced and o.chance(), "kept": kept, "dropout": p,
        "seeds": (seed, o.dropout()[1]) if p else None,
    }  # fmt: skip

    def reference(kept, dropout, seeds, **operands):
        drops = tuple(Dropout(dropout, int(seed)) for seed in seeds) if dropout else (None, None)
        return swiglu.masked_lora_swiglu(**operands, dropouts=drops)

    leaves = ("x", "mask")
    call = call_of(o, atp_kernels.masked_lora_swiglu, given, reference, leaves, frozen={"mask": mask}, largest=True)
    return call


def grouped(o: Draw) -> tuple[list[Tensor], list[tuple[int, Tensor]], Tensor]:
    """(factors, groups, removed)."""
    n_groups, kind = o.size(1), o.draw.choice(("any", "runs", "separate"))
    mixed = o.chance(0.2) and o.backend in ("auto", "reference")
    factors, owners, last = [], [], 0
    for _ in range(o.draw.randint(1, 4)):
        shape, axis = (o.size(1), o.size(1)), o.draw.randrange(2)
        index = torch.randint(n_groups, (shape[axis],), generator=o.generator)
        if kind != "any":
            index = last + torch.arange(shape[axis]) // (1 if kind == "separate" else 3)
            last = int(index[-1]) + 1
        factors.append(o.tensor(*shape, dtype=o.factor_dtype() if mixed else None))
        owners.append((axis, index))
    return factors, owners, o.flags(n_groups if kind == "any" else last)


def copies_of(factors: Any) -> Any:
    """Factors that a call may write to; what is none of them as it is."""
    if not isinstance(factors, list) or not all(isinstance(one, Tensor) for one in factors):
        return factors
    return [one.detach().clone().requires_grad_(one.requires_grad) for one in factors]


def draw_groups(o: Draw, name: str) -> Call:
    factors, owners, removed = grouped(o)
    if name != "group_lasso":  # which write to them, so each element has a place of its own
        factors = copies_of(factors)
    given = {"factors": factors, "groups": owners, "removed": removed}
    if o.chance():
        given["groups"] = GroupPlan.of(factors, owners, len(removed))
    frozen = {"groups": owners}
    named_factors = {f"factors[{i}]": factor for i, factor in enumerate(factors)}
    if name == "group_lasso":
        given["eps"] = o.draw.choice((1e-8, 1e-3))
        call = call_of(o, atp_kernels.group_lasso, given, groups.group_lasso, frozen=frozen)
        call.leaves = named_factors
        return call
    if name == "group_lasso_grad_":
        given |= {"eps": o.draw.choice((1e-8, 1e-3)), "weight": o.draw.choice((1.0, 0.3, torch.tensor(2.0)))}

        def function(factors, **options):
            copies = copies_of(factors)
            value = atp_kernels.group_lasso_grad_(copies, **options)
            return [value, *(copy.grad for copy in copies)]

        def reference(factors, weight, **options):
            value = groups.group_lasso(factors, **options)
            learning = [factor for factor in factors if factor.requires_grad]
            if not learning:
                return [value, *[None] * len(factors)]
            found = iter(torch.autograd.grad(value, learning, weight.double() if hasattr(weight, "double") else None))
            scale = 1 if hasattr(weight, "double") else weight
            return [value.detach(), *(scale * next(found) if one.requires_grad else None for one in factors)]

        return call_of(o, function, given, reference, frozen=frozen)
    given["threshold"] = o.draw.choice(
        (0.0, 0.3, 3.0, torch.rand(len(removed), generator=o.generator, dtype=torch.float64))
    )

    def function(factors, **options):
        copies = copies_of(factors)
        atp_kernels.group_prox_(copies, **options)
        return [copy.detach() for copy in copies]

    def reference(factors, **options):
        copies = [factor.detach().clone() for factor in factors]
        groups.group_prox_(copies, **options)
        return copies

    call = call_of(o, function, given, reference, frozen=frozen)
    # 1 - threshold / norm is a difference of numbers up to this.
    call.size = lambda part: 4 * factors[int(part.split()[1])].detach().double().abs().max()
    return call


def draw_compact(o: Draw) -> Call:
    n, k = o.size(), o.size()
    weight = o.tensor(n, k, dtype=o.draw.choice(DTYPES) if o.backend in ("auto", "reference") else None)
    indices = [
        o.draw.choice((None, o.flags(size), o.laid(torch.randint(max(1, size), (o.size() * (size > 0),)))))
        for size in (n, k)
    ]
    given = {"weight": weight, "rows": indices[0], "cols": indices[1], "pad_to": o.draw.choice((1, 2, 8))}

    def reference(weight, rows, cols, pad_to):
        rows, cols = (i.nonzero()[:, 0] if i is not None and i.dtype == torch.bool else i for i in (rows, cols))
        return compaction.compact(weight.detach(), rows, cols, pad_to)

    call = call_of(o, atp_kernels.compact, given, reference)
    call.size = lambda part: torch.zeros(())
    return call


def draw_dropout(o: Draw) -> Call:
    p, seed = o.draw.choice((0.0, 0.25, 0.99)), o.dropout()[1]
    given = {"x": o.tensor(*o.leading(), o.size()), "p": p, "seed": seed}

    def reference(x, p, seed):
        return dropped(matrix(x), Dropout(p, int(seed))).view(x.shape) if p else x

    return call_of(o, atp_kernels.lora_dropout, given, reference, ("x",))


def draw_norm(o: Draw) -> Call:
    size, eps = o.size(1), o.draw.choice((1e-6, 1e-2))
    rows, dtype = o.leading(), o.draw.choice((None, None, torch.float32, torch.bfloat16))
    dtype = None if o.backend == "native" and dtype not in (None, o.dtype) else dtype
    given = {"x": o.tensor(*rows, size), "weight": o.tensor(size), "eps": eps, "dtype": dtype}

    def reference(x, weight, eps, dtype):
        return norm.rms_norm(x, weight, eps)

    call = call_of(o, atp_kernels.rms_norm, given, reference, ("x", "weight"))

    def sizes(part: str) -> Tensor:
        x, weight = (given[name].detach().double().abs() for name in ("x", "weight"))
        return norm_sizes(part, x, (x.square().mean(-1, keepdim=True) + eps).rsqrt(), weight, call.grads.get("result"))

    call.size = sizes
    return call


def norm_sizes(part: str, x: Tensor, scale: Tensor, weight: Tensor, grad: Tensor | None) -> Tensor:
    """Of absolute values: x, or what it is the sum of, and weight."""
    normed = x * scale
    if part.startswith("result"):
        return normed * weight
    grad = torch.zeros_like(x) if grad is None else grad.double().abs()
    if part == "gradient of weight":
        return (grad * normed).reshape(-1, len(weight)).sum(0)
    return scale * (grad * weight + normed * (grad * weight * normed).mean(-1, keepdim=True))


def draw_sum_and_norm(o: Draw) -> Call:
    size, eps, rows = o.size(1), o.draw.choice((1e-6, 1e-2)), o.leading()
    output = o.tensor(*rows, size, dtype=o.draw.choice((o.dtype, o.dtype, torch.bfloat16)))
    given = {
        "x": o.tensor(*rows, size), "output": output, "weight": o.tensor(size), "eps": eps,
        "multiplier": o.draw.choice((1.0, 0.22)), "dtype": None,
    }  # fmt: skip

    def reference(x, output, weight, eps, multiplier, dtype):
        return norm.add_rms_norm(x, output, weight, eps, multiplier)

    call = call_of(o, atp_kernels.add_rms_norm, given, reference, ("x", "output", "weight"))
    call.dtype = max(o.dtype, output.dtype, key=lambda dtype: torch.finfo(dtype).eps)

    def sizes(part: str) -> Tensor:
        x, output, weight = (given[name].detach().double() for name in ("x", "output", "weight"))
        output = given["multiplier"] * output
        scale = ((x + output).square().mean(-1, keepdim=True) + eps).rsqrt()
        parts = x.abs() + output.abs()
        if part == "result 0":
            return parts
        found = norm_sizes(part, parts, scale, weight.abs(), call.grads.get("result 1"))
        if part in ("gradient of x", "gradient of output"):
            found = found + (call.grads["result 0"].double().abs() if "result 0" in call.grads else 0)
        return found * given["multiplier"] if part == "gradient of output" else found

    call.size = sizes
    return call


def draw_rotary(o: Draw) -> Call:
    batch, tokens, size = o.size(), o.size(), 2 * o.size()
    angles = (o.draw.choice((1, batch)), tokens)
    position = torch.randint(max(1, size), (size,), generator=o.generator) if o.chance(0.3) and size else None
    cos, sin = (o.tensor(*angles, size, dtype=o.factor_dtype(), learns=False) for _ in range(2))
    given = {
        "q": o.tensor(batch, tokens, o.size(), size), "k": o.tensor(batch, tokens, o.size(), size), "cos": cos,
        "sin": sin, "index": position, "width": o.draw.choice((None, size, size + 3)),
    }  # fmt: skip
    call = call_of(o, atp_kernels.rotary_embedding, given, rotary.rotary_embedding, ("q", "k"))

    def sizes(part: str) -> Tensor:
        factor = sum(float(one.double().abs().max()) if one.numel() else 0.0 for one in (cos, sin))
        read = [given["q"], given["k"]] if part.startswith("result") else list(call.grads.values())
        return (
            factor
            * torch.stack([one.detach().double().abs().max() for one in read if one.numel()] or [torch.zeros(())]).max()
        )

    call.size = sizes
    return call


def draw_entropy(o: Draw) -> Call:
    rows, vocab = o.draw.choice(ROWS), o.size(1)
    logits = o.tensor(rows, vocab, learns=False)
    logits = logits.clone() if rows and vocab and 0 in logits.stride() else logits
    given = {"logits": logits, "targets": o.laid(torch.randint(vocab, (rows,), generator=o.generator))}

    def function(logits, targets, backend):
        if not isinstance(logits, Tensor):
            return atp_kernels.cross_entropy_(logits, targets, backend=backend)
        held = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(logits)
        return atp_kernels.cross_entropy_(held, targets, backend=backend), held

    def reference(logits, targets):
        held = logits.clone()
        return loss.cross_entropy_(held, targets), held

    call = call_of(o, function, given, reference)
    call.size = lambda part: torch.tensor(1.0) if part == "result 1" else 2 * logits.double().abs().sum() + 5
    return call


def draw_module(o: Draw) -> Call:
    n_out, n_in = o.size(1), o.size(1)
    o.backend = "auto"
    layer = atp_kernels.nn.MaskedLoRALinear(
        o.tensor(n_out, n_in, learns=False), o.tensor(n_out, learns=False) if o.chance() else None,
        r=o.draw.choice((1, 2, 8)), alpha=o.draw.choice((1.0, 4.0)), mask_lora=o.chance(),
    )  # fmt: skip
    torch.nn.init.normal_(layer.lora_A, generator=o.generator)
    torch.nn.init.normal_(layer.lora_B, generator=o.generator)
    layer.out_mask, layer.in_mask = o.mask(n_out), o.mask(n_in)
    merged = layer.merge()
    operands = {
        "weight": layer.weight, "lora_a": layer.lora_A, "lora_b": layer.lora_B, "bias": layer.bias,
        "out_mask": layer.out_mask, "in_mask": layer.in_mask,
    }  # fmt: skip

    def function(x, backend):
        return layer(x), merged(x)

    def reference(x, **operands):
        y = linear.masked_lora_linear(x, **operands, scaling=layer.scaling, mask_lora=layer.mask_lora)
        return y, y

    given = {"x": o.tensor(*o.leading(), n_in, learns=False)}
    return call_of(o, function, given, reference, frozen=operands)


CALLS: dict[str, Callable[[Draw], Call]] = {
    "compact": draw_compact,
    "cross_entropy_": draw_entropy,
    "group_lasso": lambda o: draw_groups(o, "group_lasso"),
    "group_lasso_grad_": lambda o: draw_groups(o, "group_lasso_grad_"),
    "group_prox_": lambda o: draw_groups(o, "group_prox_"),
    "kept_lora_linear": draw_kept,
    "lora_dropout": draw_dropout,
    "masked_lora_linear": draw_linear,
    "masked_lora_qkv": draw_qkv,
    "masked_lora_swiglu": draw_swiglu,
    "nn.MaskedLoRALinear": draw_module,
    "rms_norm": draw_norm,
    "add_rms_norm": draw_sum_and_norm,
    "rotary_embedding": draw_rotary,
}
