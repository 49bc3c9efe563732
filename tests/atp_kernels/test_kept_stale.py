"""A slice is a copy: it says so when its weight, its bias or its masks changed after it was made."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import atp_kernels
from atp_kernels import KeptFirst, KeptSlice, kept_lora_linear

OUT, IN = torch.tensor([True, False, True, True]), torch.tensor([True, True, False])
FACTORS = torch.ones(2, 3, requires_grad=True), torch.ones(4, 2, requires_grad=True)
X = torch.ones(5, 3)


def weights():
    linear = nn.Linear(3, 4)
    return linear.requires_grad_(False)


def call(kept):
    return kept_lora_linear(X, kept, *FACTORS, scaling=1.0)


CHANGES = {
    "add_": lambda linear: linear.weight.add_(1.0),
    "copy_": lambda linear: linear.weight.copy_(torch.zeros(4, 3)),
    "row": lambda linear: linear.weight[1].fill_(2.0),
    "detached": lambda linear: linear.weight.detach().mul_(2.0),
    "load_state_dict": lambda linear: linear.load_state_dict(weights().state_dict()),
    "bias": lambda linear: linear.bias.zero_(),
}


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_refused_with_the_remedy(change, used):
    linear = weights()
    options = {"out_mask": OUT, "in_mask": IN}
    kept = KeptSlice(linear.weight, linear.bias, **options)
    if used:
        call(kept)
    CHANGES[change](linear)
    name = "bias" if change == "bias" else "weight"
    with pytest.raises(RuntimeError, match=f"^the {name} of this KeptSlice changed in place .*: make a new slice.$"):
        call(kept)
    fresh = call(KeptSlice(linear.weight, linear.bias, **options))
    masked = atp_kernels.masked_lora_linear(
        X, linear.weight, *FACTORS, scaling=1.0, bias=linear.bias, out_mask=OUT, in_mask=IN
    )
    torch.testing.assert_close(fresh, masked)


class Layer(nn.Module):
    """A module that holds a slice of a layer of its own."""

    def __init__(self):
        super().__init__()
        self.base = weights()
        self.make_slice()

    def make_slice(self):
        self.kept = KeptSlice(self.base.weight, self.base.bias, out_mask=OUT, in_mask=KeptFirst(IN))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
    "copy of a copy": lambda module: copy.deepcopy(copy.deepcopy(module)),
}


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("copied", COPIES)
def test_the_slice_of_a_copied_module_looks_at_the_weight_of_the_copy(copied, used):
    for change in CHANGES.values():
        module = Layer()
        expected = call(module.kept)
        if not used:
            module.make_slice()
        other = COPIES[copied](module)
        torch.testing.assert_close(call(other.kept), expected)
        change(other.base)
        with pytest.raises(RuntimeError, match="changed in place after it was made"):
            call(other.kept)
        assert torch.equal(call(module.kept), expected)


def test_a_slice_whose_weight_learns_by_now_is_copied():
    linear = weights()
    kept = KeptSlice(linear.weight, out_mask=OUT)
    expected = call(kept)
    linear.weight.requires_grad_(True)
    assert torch.equal(call(copy.deepcopy(kept)), expected)
    weight = linear.weight.detach().clone()
    kept = KeptSlice(weight, out_mask=OUT)
    weight.mul_(linear.weight)
    with pytest.raises(RuntimeError, match="changed in place"):
        call(copy.deepcopy(kept))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_order_knows_whether_its_mask_changed(copied):
    mask = OUT.clone()
    mask.logical_not_().logical_not_()  # versions of a copy start anew
    order = KeptFirst(mask)
    same = COPIES[copied](order)
    assert KeptSlice(weights().weight, out_mask=same).fits(order, None)
    assert KeptSlice(weights().weight, out_mask=order).fits(same, None)
    mask.logical_not_()
    late = COPIES[copied](order)
    assert not KeptSlice(weights().weight, out_mask=KeptFirst(mask.clone())).fits(late, None)


def test_a_weight_that_changes_before_the_backward_pass_is_refused_there():
    linear = weights()
    kept = KeptSlice(linear.weight, out_mask=OUT)
    y = kept_lora_linear(X.clone().requires_grad_(), kept, *FACTORS, scaling=1.0)
    linear.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place after it was made"):
        y.sum().backward()


def test_what_changes_no_value_is_no_change():
    """Reading, another place in memory, and another requires_grad leave a slice as it is."""
    one = weights()
    kept = KeptSlice(one.weight, one.bias, out_mask=OUT)
    before = call(kept)
    one.weight.data = one.weight.data.clone()
    one.weight.requires_grad_(True).requires_grad_(False)
    one(X)
    assert torch.equal(call(kept), before)


def test_weights_of_inference_mode_are_taken_at_their_word():
    with torch.inference_mode():
        weight = torch.ones(4, 3)
        assert torch.equal(call(KeptSlice(weight, out_mask=OUT)), call(KeptSlice(weight.clone(), out_mask=OUT)))


@pytest.mark.parametrize("side", [lambda mask: mask, KeptFirst], ids=["mask", "kept-first"])
def test_a_slice_fits_no_mask_that_changed(side):
    mask = OUT.clone()
    order = side(mask)
    kept = KeptSlice(weights().weight, out_mask=order)
    assert kept.fits(order, None) and kept.fits(side(mask.clone()), None)
    later = side(mask)
    mask.logical_not_()
    assert not kept.fits(order, None) and not kept.fits(side(mask.clone()), None)
    if side is KeptFirst:
        assert not KeptSlice(weights().weight, out_mask=KeptFirst(mask.clone())).fits(later, None)
