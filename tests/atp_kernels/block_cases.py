"""Operands of whole blocks, their definitions and the error rule."""

import copy

import torch
from linear_cases import with_gradients

from atp_kernels import KeptFirst, KeptSlice, Projection, masked_lora_swiglu
from atp_kernels.swiglu import definition


class Case:
    """Operands of a block by name, as leaves: x, and weight, lora_a, lora_b, bias of each linear; masks by linear."""

    def __init__(self, shapes, *, mask=None, dtype=torch.float32, rank=3, rows=(2, 6), bias=True, frozen=False, seed=0):
        rng = torch.Generator().manual_seed(seed)
        randn = lambda *size: torch.randn(size, generator=rng).to(dtype)  # noqa: E731
        self.names = [str(i) for i in range(len(shapes))]
        self.leaves = {"x": randn(*rows, shapes[0][1])}
        for name, (n, k) in zip(self.names, shapes, strict=True):
            parts = {"weight": randn(n, k) / k**0.5, "lora_a": randn(rank, k) / k**0.5, "lora_b": randn(n, rank)}
            parts |= {"bias": randn(n)} if bias else {}
            self.leaves |= {f"{name} {part}": tensor for part, tensor in parts.items()}
        for tensor in self.leaves.values():
            tensor.requires_grad_()
        if frozen:
            self.freeze("weight", "bias")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.masks = []
        for i, (n, _) in enumerate(shapes):
            values = torch.rand(n, generator=rng)
            full = {"empty": values > 1, "full": values < 1, "hard": values > 0.4, None: None}
            self.masks.append(values.to(wide).requires_grad_() if mask == "soft" else full[mask])
            if mask == "soft":
                self.leaves[f"mask {i}"] = self.masks[-1]

    def freeze(self, *parts):
        for name, tensor in self.leaves.items():
            if name.split()[-1] in parts:
                tensor.requires_grad_(False)

    @property
    def x(self):
        return self.leaves["x"]

    def linears(self, scalings=(1.7, 0.6, 1.3)):
        parts = ("weight", "lora_a", "lora_b", "bias")
        return [
            Projection(**{part: self.leaves.get(f"{name} {part}") for part in parts}, scaling=scaling)
            for name, scaling in zip(self.names, scalings, strict=True)
        ]

    def results(self, values, absolute=False):
        """The results side by side, and the gradient of one functional of them in every leaf that wants one."""
        values = values if isinstance(values, tuple) else (values,)
        wanted = {name: tensor for name, tensor in self.leaves.items() if tensor.requires_grad}
        return with_gradients((torch.cat([value.flatten(0, -2) for value in values], -1),), wanted, absolute)

    def upcast(self, absolute=False):
        """The same operands in float64, or their absolute values."""
        other = copy.copy(self)
        other.leaves = {}
        for name, tensor in self.leaves.items():
            wide = tensor.detach().double()
            other.leaves[name] = (wide.abs() if absolute else wide).requires_grad_(tensor.requires_grad)
        other.masks = [other.leaves.get(f"mask {i}", mask) for i, mask in enumerate(self.masks)]
        return other


def assert_as_good_as(definition, got, case):
    """The rule of `linear_cases.assert_as_good_as_unfused`, for any definition."""
    exact_case, size_case = case.upcast(), case.upcast(absolute=True)
    exact, plain = exact_case.results(definition(exact_case)), case.results(definition(case))
    sizes = size_case.results(definition(size_case), absolute=True)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.shape == exact[name].shape
        error, own = ((some.double() - exact[name]).norm().item() for some in (value, plain[name]))
        allowed = max(2 * own, torch.finfo(case.x.dtype).eps * sizes[name].norm().item())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def saved_shapes(call):
    """Shapes of the distinct tensors that autograd keeps for a call."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        call()
    return sorted(tuple(tensor.shape) for tensor in saved.values())


MLP = ((20, 12), (20, 12), (12, 20))
QKV = ((24, 12), (8, 12), (8, 12))
FORMS = [(mask, mask_lora) for mask in ("soft", "hard", "empty", "full") for mask_lora in (False, True)]
EQUAL = (1.7, 1.7, 1.3)


def mlp_definition(case, activation="silu", mask_lora=False, scalings=EQUAL, dropouts=(None, None)):
    options = {"activation": activation, "mask": case.masks[0], "mask_lora": mask_lora, "dropouts": dropouts}
    return definition.masked_lora_swiglu(case.x, *case.linears(scalings), **options)


def mlp_case(mask=None, shapes=MLP, **options):
    """One mask for gate and up, at the input of down too."""
    case = Case(shapes, mask=mask, **options)
    for i in (1, 2):
        case.leaves.pop(f"mask {i}", None)
    return case


def mlp(case, scalings=EQUAL, **options):
    return masked_lora_swiglu(case.x, *case.linears(scalings), mask=case.masks[0], **options)


def slices_of(case, first, pad_to=8):
    mask = KeptFirst(case.masks[0], pad_to=pad_to) if first else case.masks[0]
    sides = ("out_mask", "out_mask", "in_mask")
    return tuple(
        KeptSlice(linear.weight, linear.bias, **{side: mask}, pad_to=pad_to)
        for linear, side in zip(case.linears(), sides, strict=True)
    )
