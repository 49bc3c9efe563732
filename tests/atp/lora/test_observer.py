"""Gradients of a mask that nobody applies, against those of a soft mask, sample by sample."""

import pytest
import torch
from peft import LoraConfig
from tiny_lora import masked, stock
from torch.testing import assert_close

from atp.lora.controller import MaskController
from atp.lora.layer import observed

SPACES = ["kv_group", "head_dim", "disp"]


def lora_model(space_name, dtype=torch.float64):
    model, space = masked(space_name=space_name, initializer_range=0.05)
    return model.to(dtype), space, MaskController(model, space)


def loss_of(model, ids):
    return model(input_ids=ids).logits.square().mean((1, 2)).sum()


def gradient_of_a_mask(model, space, controller, ids):
    """In float64, of one sample."""
    mask = torch.ones(space.size, dtype=torch.float64, requires_grad=True)
    with controller.masks(mask, "soft"):
        return torch.autograd.grad(loss_of(model, ids), mask)[0].float()


@pytest.mark.parametrize("space", SPACES)
def test_each_sample_has_the_gradient_of_a_mask_of_its_own(space):
    model, space, controller = lora_model(space)
    ids = torch.randint(0, 29, (3, 9))
    with controller.observer.observing(3) as sums:
        loss_of(model, ids).backward()
    found = controller.observer.gradients(sums)
    for sample in range(3):
        expected = gradient_of_a_mask(model, space, controller, ids[sample : sample + 1])
        assert expected.count_nonzero() > space.size // 2
        assert_close(found[sample], expected, rtol=1e-5, atol=1e-9)


def hooked_gradient_of_a_mask(model, space, ids):
    """In float64, of one sample: hooks multiply what stock PEFT layers read and give."""
    mask = torch.ones(space.size, dtype=torch.float64, requires_grad=True)
    layers, hooks = model.get_base_model().model.layers, []
    for layer, name, out, inputs in space.module_masks(mask, soft=True):
        linear = layers[layer].get_submodule(name)
        if out is not None:
            hooks.append(linear.register_forward_hook(lambda _, __, y, out=out: y * out))
        if inputs is not None:
            hooks.append(linear.register_forward_pre_hook(lambda _, x, inputs=inputs: (x[0] * inputs,)))
    (found,) = torch.autograd.grad(loss_of(model, ids), mask)
    for hook in hooks:
        hook.remove()
    return found.float()


@pytest.mark.parametrize(("variant", "flag"), [("rslora", "use_rslora"), ("dora", "use_dora")])
@pytest.mark.parametrize("space", SPACES)
def test_a_variant_has_the_gradient_of_a_mask_on_stock_layers(space, variant, flag):
    """Observed in a step that trains it, and under a soft mask."""
    model, space = masked(space_name=space, variant=variant, initializer_range=0.05)
    controller = MaskController(model.double(), space)
    other = stock(flags={flag: True}, initializer_range=0.05).double()
    ids = torch.randint(0, 29, (3, 9))
    with controller.observer.observing(3) as sums:
        loss_of(model, ids).backward()
    found = controller.observer.gradients(sums)
    for sample in range(3):
        row = ids[sample : sample + 1]
        expected = hooked_gradient_of_a_mask(other, space, row)
        assert expected.count_nonzero() > space.size // 2
        assert_close(found[sample], expected, rtol=1e-5, atol=1e-9)
        assert_close(gradient_of_a_mask(model, space, controller, row), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("space", SPACES)
def test_the_adapter_learns_what_it_learns_unobserved(space):
    model, space, controller = lora_model(space, torch.float32)
    ids = torch.randint(0, 29, (2, 9))
    grads = []
    for samples in (None, 2):
        model.zero_grad()
        if samples is None:
            loss_of(model, ids).backward()
        else:
            with controller.observer.observing(samples):
                loss_of(model, ids).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0]
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("space", SPACES)
def test_kept_decisions_under_a_hard_mask_have_their_gradient(space):
    model, space, controller = lora_model(space)
    mask, ids = torch.rand(space.size) > 0.3, torch.randint(0, 29, (1, 9))
    soft = mask.double().requires_grad_()
    with controller.masks(soft, "soft"):
        (expected,) = torch.autograd.grad(loss_of(model, ids), soft)
    with controller.masks(mask, "sum"), controller.observer.observing(1) as sums:
        loss_of(model, ids).backward()
    found = controller.observer.gradients(sums)[0]
    assert_close(found[mask], expected[mask].float(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("samples", [1, 2, 4, 5])
def test_a_batch_of_another_size_takes_the_rows_in_turns(samples):
    """The sums lie apart in memory."""
    values, sums = torch.randn(samples, 3, 7, requires_grad=True), torch.zeros(2, 14)[:, ::2]
    assert torch.equal(observed(values, sums), values)
    observed(values, sums).square().sum().backward()
    each = (2 * values.detach().square()).sum(1)
    expected = torch.stack([each[turn::2].sum(0) for turn in range(2)])
    assert_close(sums, expected)
    assert_close(values.grad, 2 * values.detach())


def test_a_turned_off_observer_leaves_no_trace():
    model, _, controller = lora_model("kv_group", torch.float32)
    ids = torch.randint(0, 29, (2, 9))
    with controller.observer.observing(2) as sums, torch.no_grad():
        loss_of(model, ids)
    loss_of(model, ids).backward()
    assert not any(part.any() for part in sums)


def test_it_sees_other_adapters_too():
    """Those that run PEFT's own forward, as DoRA does."""
    model, space, controller = lora_model("kv_group")
    model.add_adapter("other", LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj", "down_proj"]))
    model.set_adapter("other")
    ids = torch.randint(0, 29, (1, 9))
    with controller.observer.observing(1) as sums:
        loss_of(model, ids).backward()
    assert controller.observer.gradients(sums).isfinite().all()
