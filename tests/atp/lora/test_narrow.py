"""Frozen weights cast once per run and not once per step: same results, never stale, gone where masks need the room."""

import pytest
import torch
from tiny_lora import masked
from torch import nn

from atp.lora.controller import MaskController
from atp.lora.layer import MaskedPeftLinear
from atp.spaces.space import MaskSpace


@pytest.fixture
def model():
    return masked(space_name="kv_group", vocab_size=64, attention_bias=False)[0].train()


def layers(model):
    return [module for module in model.modules() if isinstance(module, MaskedPeftLinear)]


def step(model, autocast=True):
    """Loss and gradients of one training step."""
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_cast_weight_changes_no_bit(model, monkeypatch):
    ours = step(model)
    assert all(layer._narrow is not None for layer in layers(model))
    assert same(step(model), ours)
    monkeypatch.setattr(MaskedPeftLinear, "_narrowed", lambda self, weight: weight)
    assert same(step(model), ours)


@pytest.mark.parametrize("replaced", [False, True])
def test_another_weight_is_cast_again(model, replaced):
    before = step(model)
    base = layers(model)[3].get_base_layer()
    if replaced:
        base.weight = nn.Parameter(2 * base.weight.detach(), requires_grad=False)
    else:
        with torch.no_grad():
            base.weight.mul_(1.5)
    changed = step(model)
    assert not torch.equal(before[0], changed[0])
    for layer in layers(model):
        layer._narrow = None
    assert same(step(model), changed)


def test_an_observed_step_leaves_the_cast_weight_alone(model):
    """As every open step is with a running saliency."""
    space = MaskSpace.from_config(model.config, "kv_group")
    controller = MaskController(model, space)

    def watched():
        with controller.observer.observing(1) as sums:
            return [*step(model), controller.observer.gradients(sums)]

    first = watched()
    held = [layer._narrow[2] for layer in layers(model)]
    assert same(watched(), first)
    assert all(layer._narrow[2] is weight for layer, weight in zip(layers(model), held, strict=True))
    for layer in layers(model):
        layer.holds_casts, layer._narrow = False, None
    assert same(watched(), first)


@pytest.mark.parametrize("constant", [False, True])
def test_nothing_is_kept_without_need(model, constant):
    step(model, autocast=False)
    assert all(layer._narrow is None for layer in layers(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert all(layer._narrow is None for layer in layers(model))
    step(model)
    model.requires_grad_(not constant)
    for layer in layers(model):
        layer.set_masks(torch.ones(layer.out_features, dtype=torch.float32 if constant else torch.bool), None)
    assert all(layer._narrow is None for layer in layers(model))
