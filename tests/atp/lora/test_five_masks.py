"""An MLP and the linears of attention under the five masks of `disp`, against plain float64 products by hand."""

import pytest
import torch
from tiny_lora import ALPHA, RANK, masked, random_mask
from torch.nn.functional import silu
from torch.testing import assert_close

from atp.lora.controller import MaskController
from atp.lora.layer import MaskedMLP

SCALING = ALPHA / RANK
WIDE = {"mlp_bias": True, "hidden_size": 48, "intermediate_size": 70, "num_attention_heads": 4, "head_dim": 12,
        "initializer_range": 0.15}  # fmt: skip


def layers(form):
    """The first layer under a mask, its masks by structure, and the leaves that they come from."""
    model, space = masked(space_name="disp", **WIDE)
    model.double().eval()
    mask = random_mask(space)
    if form == "soft":
        values = torch.rand(space.size, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 0.8 + 0.1
        mask = values.requires_grad_()
    controller = MaskController(model, space)
    controller.set(mask, form)
    parts = {s.name: mask[s.span].double() for s in space.layer(0)}
    return model.get_base_model().model.layers[0], parts, mask


def linear(x, layer, ins, outs, form):
    """x W^T + b and scaling * x A^T B^T under masks of both sides; base and hard mask the first of them alone."""
    base = layer.get_base_layer()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    bias = 0 if base.bias is None else base.bias
    if form in ("soft", "sum"):
        return ((x * ins) @ base.weight.T + bias + SCALING * (x * ins) @ a.T @ b.T) * outs
    return ((x * ins) @ base.weight.T + bias) * outs + SCALING * x @ a.T @ b.T


def plain_mlp(mlp, x, parts, form):
    read, width, written = parts["mlp_inputs"], parts["mlp"], parts["mlp_outputs"]
    gate, up = (linear(x, proj, read, width, form) for proj in (mlp.gate_proj, mlp.up_proj))
    inner = 1.0 if form == "soft" else width  # a soft mask has multiplied gate and up already
    return linear(silu(gate) * up, mlp.down_proj, inner, written, form)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("form", ["soft", "hard", "base", "sum"])
def test_mlp_under_five_masks(form, fused):
    """Output, and gradients of the input, of all LoRA factors and of the soft masks."""
    layer, parts, mask = layers(form)
    mlp = layer.mlp
    assert isinstance(mlp, MaskedMLP) and (mlp.gate_proj.kept is not None) == (form == "hard")
    if not fused:
        mlp.activation = None
    x = torch.randn(2, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    weights = torch.randn(2, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    factors = [p for name, p in mlp.named_parameters() if "lora_" in name]
    leaves = [x, *factors, *([mask] if form == "soft" else [])]
    found, expected = mlp(x), plain_mlp(mlp, x, parts, form)
    assert_close(found, expected, rtol=0, atol=1e-10)
    pairs = (torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True) for y in (found, expected))
    for one, other in zip(*pairs, strict=True):
        assert_close(one, other, rtol=0, atol=1e-9)
    assert len(factors) == 6 and expected.abs().max() > 1e-3


@pytest.mark.parametrize("form", ["soft", "hard", "base", "sum"])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_attention_linears_select_inputs_and_outputs(name, form):
    layer, parts, mask = layers(form)
    proj, whole = layer.self_attn.get_submodule(name), torch.ones((), dtype=torch.float64)
    ins, outs = (whole, parts["attention_outputs"]) if name == "o_proj" else (parts["attention_inputs"], whole)
    x = torch.randn(3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    leaves = [x, proj.lora_A["default"].weight, proj.lora_B["default"].weight, *([mask] if form == "soft" else [])]
    found, expected = proj(x), linear(x, proj, ins, outs, form)
    assert_close(found, expected, rtol=0, atol=1e-10)
    pairs = (torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected))
    for one, other in zip(*pairs, strict=True):
        assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["soft", "hard", "sum"])
def test_mlp_under_bfloat16_autocast_is_as_near_to_float64_as_separate_linears(form):
    errors = {}
    for fused in (True, False):
        layer, parts, _ = layers(form)
        x = torch.randn(4, 16, 48, generator=torch.Generator().manual_seed(7)) * 0.3
        with torch.no_grad():
            exact = plain_mlp(layer.mlp, x.double(), parts, form)
            mlp = layer.mlp.float()
            if not fused:
                mlp.activation = None
            with torch.autocast("cpu", torch.bfloat16):
                errors[fused] = float((mlp(x).double() - exact).norm() / exact.norm())
    assert errors[True] <= 1.5 * errors[False] + 1e-3 and errors[False] < 0.02
