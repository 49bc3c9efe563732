"""Kept slices of drawn operands, their results in the model's order, and the error rule."""

from linear_cases import assert_as_good_as_unfused, unfused, with_gradients

from atp_kernels import KeptFirst, KeptSlice, kept_lora_linear

FROZEN = ("weight", "bias", "out_mask", "in_mask")
KINDS = (None, "hard", "empty", "full")
IN_ORDER = (False, False)
ORDERS = [(True, True), (True, False), (False, True)]


def trained(tensors):
    return {name: tensor for name, tensor in tensors.items() if name not in FROZEN}


def slice_of(tensors, first=IN_ORDER, pad_to=8, **options):
    """The slice of operands; first says which of outputs and inputs lie kept first."""
    frozen = {name: tensors[name].detach() for name in FROZEN if name in tensors}
    for name, ordered in zip(("out_mask", "in_mask"), first, strict=True):
        if ordered and name in frozen:
            frozen[name] = KeptFirst(frozen[name], pad_to=pad_to)
    return KeptSlice(**frozen, pad_to=pad_to, **options)


def call_of(tensors, kept, scaling, backend="auto"):
    """The linear on operands in the model's order, permuted on the way in and back on the way out."""
    given = trained(tensors)
    if isinstance(kept.in_mask, KeptFirst):
        given |= {name: given[name][..., kept.in_mask.index] for name in given.keys() & {"x", "lora_input"}}
    y = kept_lora_linear(**given, kept=kept, scaling=scaling, backend=backend)
    return y[..., kept.out_mask.place] if isinstance(kept.out_mask, KeptFirst) else y


def results_of(shape, tensors, kept, backend="auto"):
    """y and the gradients of what can have one."""
    y = call_of(tensors, kept, shape.scaling, backend)
    return with_gradients((y,), trained(tensors))


def run(shape, tensors, backend="auto", **options):
    return results_of(shape, tensors, slice_of(tensors, **options), backend)


def assert_error_rule(got, shape, tensors):
    """A slice is frozen: the definition's own gradients of weight and bias stand in for those it does not compute."""
    plain = with_gradients(unfused(shape, tensors), tensors)
    assert_as_good_as_unfused(plain | got, shape, tensors)
