"""Attention with RoPE in one kernel each way: what every family's own computes, in whole models and in cut ones."""

import pytest
import torch
from tiny_families import FAMILIES, LAYERS, build, random_mask, space_of, tokens
from torch.testing import assert_close

from atp.families import family_of
from atp.lora.attention import FusedAttention
from atp.lora.layer import add_lora, stock_modules, unload
from atp.models import attention
from atp.removal import cut_model
from atp.spaces.space import MaskSpace


@pytest.fixture
def rotations(monkeypatch):
    """Makes the CPU a device where RoPE is one kernel, and lists the widths of the heads that it is asked for."""
    asked, real = [], attention.rotary_embedding

    def noted(query, key, *angles, index, width):
        asked.append(width)
        return real(query, key, *angles, index=index, width=width)

    monkeypatch.setattr(attention, "rotary_embedding", noted)
    return lambda: monkeypatch.setattr(attention, "FUSED_ON", ("cpu",)), asked


def with_lora(model, space):
    model = add_lora(model, space, r=2, alpha=4.0, dropout=0.0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model


def computed(model):
    """Logits, and the gradients of whatever trains."""
    logits = model(input_ids=tokens(), use_cache=False).logits
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logits, *torch.autograd.grad(logits.square().mean(), leaves)]


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(name, how) for name in FAMILIES for how in ("sdpa", "eager") if (name, how) != ("gemma2", "sdpa")],
)  # transformers' sdpa has no soft caps
def test_whole_models_of_every_family(rotations, family, implementation):
    at_once, asked = rotations
    base = build(family, attn_implementation=implementation)
    model = with_lora(base, MaskSpace.from_config(base.config, space_of(family)))
    expected = computed(model)
    assert not asked
    at_once()
    assert_close(computed(model), expected)
    rotated = sum(base.config.no_rope_layers) if family == "smollm3" else LAYERS
    assert len(asked) == (0 if family_of(base.config).own_attention else rotated)
    asked.clear()
    assert model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert not asked, "a cache is filled by the model's own forward"


YARN = {  # multiplies cosines and sines
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {}), ("llama", {"rope_parameters": YARN}), ("smollm3", {}), ("mistral", {})]
)
def test_cut_models_pad_their_heads_in_the_same_kernel(rotations, family, settings):
    at_once, asked = rotations
    base = build(family, **settings)
    space = MaskSpace.from_config(base.config, "head_dim")
    model = with_lora(cut_model(base, space, random_mask(space)), space)
    assert not any(isinstance(module, FusedAttention) for module in model.modules())
    expected = computed(model)
    at_once()
    assert_close(computed(model), expected)
    assert asked and all(width % 8 == 0 for width in asked)


def test_unloading_gives_the_stock_class_back():
    base = build("llama")
    kinds, stock = [type(layer.self_attn) for layer in base.model.layers], stock_modules(base)
    model = with_lora(base, MaskSpace.from_config(base.config, "kv_group"))
    assert all(isinstance(layer.self_attn, FusedAttention) for layer in base.model.layers)
    assert all(map(isinstance, (layer.self_attn for layer in base.model.layers), kinds))
    plain = unload(model, stock)
    assert [type(layer.self_attn) for layer in plain.model.layers] == kinds
