"""Masks with a row for each sample: what they compute, their gradients, and batches of other sizes."""

import pytest
import torch
from tiny_lora import masked
from torch.testing import assert_close

from atp.lora.controller import MaskController
from atp.lora.layer import of_samples

SPACES = ["kv_group", "head_dim", "disp"]


def lora_model(space_name):
    model, space = masked(space_name=space_name, initializer_range=0.05)
    return model, space, MaskController(model, space)


def logits_and_gradient(model, controller, mask, ids):
    mask = mask.clone().requires_grad_()
    controller.set(mask, "soft")
    logits = model(input_ids=ids).logits
    (gradient,) = torch.autograd.grad(logits.square().mean((1, 2)).sum(), mask)
    controller.clear()
    return logits, gradient


@pytest.mark.parametrize("space", SPACES)
def test_each_sample_has_the_result_and_the_gradient_that_it_has_alone(space):
    model, space, controller = lora_model(space)
    masks, ids = torch.rand(3, space.size), torch.randint(0, 29, (3, 9))
    found, gradients = logits_and_gradient(model, controller, masks, ids)
    for sample in range(3):
        logits, gradient = logits_and_gradient(model, controller, masks[sample], ids[sample : sample + 1])
        assert_close(found[sample : sample + 1], logits, rtol=1e-4, atol=1e-5)
        assert_close(gradients[sample], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_lora_learns_the_same_under_equal_masks_of_samples_as_under_one(space):
    model, space, controller = lora_model(space)
    mask, ids = torch.rand(space.size), torch.randint(0, 29, (2, 9))
    grads = []
    for form in (mask, mask.expand(2, -1)):
        controller.set(form, "soft")
        model.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0]
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("samples", [0, 1, 2, 4, 5])
def test_a_batch_of_another_size_takes_the_rows_in_turns(samples):
    """The mask lies apart in memory."""
    values, mask = torch.randn(samples, 3, 7), torch.rand(2, 14)[:, ::2]
    expected = [values[i] * mask[i % 2] for i in range(samples)]
    assert_close(of_samples(values, mask), torch.stack(expected) if samples else values)


def test_nothing_of_a_mask_stays():
    model, space, controller = lora_model("kv_group")
    ids = torch.randint(0, 29, (2, 9))
    before = model(input_ids=ids).logits
    logits_and_gradient(model, controller, torch.rand(2, space.size), ids)
    assert torch.equal(model(input_ids=ids).logits, before)
