"""Frozen weights cast once per run and not once per step: same results, never stale, gone where masks need the room."""

import pytest
import torch
from tiny_lora import masked
from torch import nn

from atp.lora.controller import MaskController
from atp.lora.layer import MaskedPeftLinear
from atp.lora.packs import Packs
from atp.spaces.space import MaskSpace


@pytest.fixture(params=["packed", "each"])
def model(request, monkeypatch):
    """Whose linears are cast into packs, or each for itself, as under dropout and without the extension."""
    if request.param == "each":
        monkeypatch.setattr(Packs, "of", lambda *arguments: None)
    return masked(space_name="kv_group", vocab_size=64, attention_bias=False)[0].train()


def held(model):
    """Casts that outlive a pass."""
    packs = [layer.packs._pack for layer in layers(model)]
    narrow = [layer._narrow for layer in layers(model)]
    return [pack.weight for pack in packs if pack is not None] + [found[2] for found in narrow if found is not None]


def forget(model):
    for layer in layers(model):
        layer._narrow = None
        layer.packs.drop()


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
    ours, casts = step(model), held(model)
    assert casts and same(step(model), ours)
    assert all(now is before for now, before in zip(held(model), casts, strict=True))
    forget(model)
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
    forget(model)
    assert same(step(model), changed)


def test_an_observed_step_leaves_the_cast_weight_alone(model):
    """As every open step is with a running saliency."""
    space = MaskSpace.from_config(model.config, "kv_group")
    controller = MaskController(model, space)

    def watched():
        with controller.observer.observing(1) as sums:
            return [*step(model), controller.observer.gradients(sums)]

    first = watched()
    casts = held(model)
    assert casts and same(watched(), first)
    assert all(now is before for now, before in zip(held(model), casts, strict=True))


@pytest.mark.parametrize("constant", [False, True])
def test_nothing_is_kept_without_need(model, constant):
    step(model, autocast=False)
    assert not held(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert not held(model)
    step(model)
    model.requires_grad_(not constant)
    for layer in layers(model):
        layer.set_masks(torch.ones(layer.out_features, dtype=torch.float32 if constant else torch.bool), None)
    assert not held(model)
