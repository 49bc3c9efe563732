"""Lasso, prox and norms of removed LoRA groups against plain loops over named parameters."""

import math

import pytest
import torch
from tiny_lora import masked, random_mask, stock

from atp.lora.regularizers.lasso import LoraGroups
from atp.spaces.space import MaskSpace

# What a decision of a structure touches, as (linear, factor): rows of B or columns of A.
TOUCHED = {
    "qk": [("self_attn.q_proj", "lora_B"), ("self_attn.k_proj", "lora_B")],
    "vo": [("self_attn.v_proj", "lora_B"), ("self_attn.o_proj", "lora_A")],
    "mlp": [("mlp.gate_proj", "lora_B"), ("mlp.up_proj", "lora_B"), ("mlp.down_proj", "lora_A")],
    "kv_group": [("self_attn.q_proj", "lora_B"), ("self_attn.k_proj", "lora_B"), ("self_attn.v_proj", "lora_B"),
                 ("self_attn.o_proj", "lora_A")],
    "attention_inputs": [("self_attn.q_proj", "lora_A"), ("self_attn.k_proj", "lora_A"),
                         ("self_attn.v_proj", "lora_A")],
    "attention_outputs": [("self_attn.o_proj", "lora_B")],
    "mlp_inputs": [("mlp.gate_proj", "lora_A"), ("mlp.up_proj", "lora_A")],
    "mlp_outputs": [("mlp.down_proj", "lora_B")],
}  # fmt: skip
HEAD_DIM = 4


def owned(structure, decision, linear):
    """Rows or columns of a linear that a decision owns, for head_dim 4 with 4 query and 2 kv heads."""
    heads = 4 if linear.endswith(("q_proj", "o_proj")) else 2
    if structure == "qk":
        return [head * HEAD_DIM + decision + half for head in range(heads) for half in (0, HEAD_DIM // 2)]
    if structure == "vo":
        return [head * HEAD_DIM + decision for head in range(heads)]
    if structure == "kv_group":
        width = heads * HEAD_DIM // 2
        return list(range(decision * width, (decision + 1) * width))
    return [decision]


def removed_parts(model, space, mask):
    """For every removed decision, its views into the LoRA factors, one a cut."""
    parameters = dict(model.named_parameters())
    for structure in space.structures:
        for decision in range(structure.size):
            if mask[structure.start + decision]:
                continue
            parts = []
            for linear, factor in TOUCHED[structure.name]:
                name = f"base_model.model.model.layers.{structure.layer}.{linear}.{factor}.default.weight"
                parts.append((parameters[name], owned(structure.name, decision, linear), factor == "lora_B"))
            yield parts


def values(part):
    parameter, index, rows = part
    return (parameter[index] if rows else parameter[:, index]).double()


def joint_norm(parts):
    return math.sqrt(sum(float(values(part).detach().square().sum()) for part in parts))


@pytest.fixture(params=["head_dim", "kv_group", "disp"])
def case(request):
    model, space = masked(space_name=request.param)
    return model, space, random_mask(space)


def test_lasso_and_its_gradient_are_a_sum_of_norms_over_removed_cuts(case):
    model, space, mask = case
    factors, found = {n: p for n, p in model.named_parameters() if "lora_" in n}, []
    parts = [part for parts in removed_parts(model, space, mask) for part in parts]
    by_hand = sum((values(part).square().sum() + 1e-8).sqrt() for part in parts)
    for value in (LoraGroups(model, space).lasso(mask), by_hand):
        gradients = torch.autograd.grad(value, factors.values(), allow_unused=True, materialize_grads=True)
        found.append((value.detach().float(), dict(zip(factors, gradients, strict=True))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("there", [False, True], ids=["none", "existing"])
def test_lasso_gradient_without_autograd(case, there):
    model, space, mask = case
    groups, found = LoraGroups(model, space), []
    for call in (lambda: (0.3 * groups.lasso(mask)).backward(), lambda: groups.lasso_grad_(mask, 0.3)):
        for factor in groups.factors:
            factor.grad = factor.detach().flip(0) if there else None
        value = call()
        found.append([factor.grad for factor in groups.factors])
    torch.testing.assert_close(value, groups.lasso(mask).detach())
    for grad, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(grad, expected)


def test_prox_shrinks_the_joint_norm_of_every_removed_decision(case):
    model, space, mask = case
    groups = LoraGroups(model, space)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    norms = [joint_norm(parts) for parts in removed_parts(model, space, mask)]
    threshold = sorted(norms)[len(norms) // 2] * 1.0001
    groups.prox_(mask, threshold)
    zeros = 0
    for parts, norm in zip(removed_parts(model, space, mask), norms, strict=True):
        left = joint_norm(parts)
        assert left == pytest.approx(max(0.0, norm - threshold), abs=1e-5)
        zeros += left == 0.0
    assert 0 < zeros < len(norms)
    touched = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    names = {id(p): n for n, p in model.named_parameters()}
    for parts in removed_parts(model, space, mask):
        for parameter, index, rows in parts:
            region = touched[names[id(parameter)]]
            region[index if rows else (slice(None), index)] = True
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~touched[name]], before[name][~touched[name]]), name


def test_largest_removed_norm(case):
    model, space, mask = case
    expected = max(joint_norm(parts) for parts in removed_parts(model, space, mask))
    groups = LoraGroups(model, space)
    assert groups.largest_removed_norm(mask) == pytest.approx(expected, rel=1e-6)
    assert groups.largest_removed_norm(torch.ones_like(mask)) == 0.0
    assert groups.lasso(torch.ones_like(mask)).item() == 0.0


def test_stock_lora_has_the_same_groups():
    model, space = masked()
    mask = random_mask(space)
    theirs = stock()
    ours, others = LoraGroups(model, space), LoraGroups(theirs, MaskSpace.from_config(theirs.config))
    torch.testing.assert_close(others.lasso(mask), ours.lasso(mask))


def test_plans_lie_where_the_factors_do_and_refuse_factors_that_changed():
    model, space = masked()
    groups = LoraGroups(model, space)
    on_meta = LoraGroups(model.to("meta"), space)
    assert {plan.index.device.type for plan in (on_meta._cuts, on_meta._joint)} == {"meta"}
    wrong = ((on_meta.factors, "factors elsewhere"), (groups.factors[:-1], "factors of other shapes"))
    for changed, message in wrong:
        groups.factors = changed
        calls = (groups.lasso, lambda mask: groups.lasso_grad_(mask, 1.0), lambda mask: groups.prox_(mask, 1.0))
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call(random_mask(space))
