"""Training passes of every family: packed samples, the loss from hidden states, the refit."""

import pytest
import torch
from tiny_families import FAMILIES, SPACES, build, random_mask, space_of, tokens
from torch.nn import functional as F
from torch.testing import assert_close

from atp.data import collate
from atp.families import family_of
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.models.attention import training_masks, use_training_attention
from atp.removal import cut_model
from atp.removal.refit import refit
from atp.spaces.space import MaskSpace
from atp.training.loss import causal_lm_loss

LENGTHS = (6, 8)  # samples of each window
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])


def digits_of(name):
    """How far results may be from the truth: the class of Gemma 2 takes its softmax in float32, whatever the dtype.

    That rounds differently for samples of other lengths on some CPUs.
    """
    return 1e-5 if name == "gemma2" else 1e-10


def both(name):
    """The stock model and a cut one, in float64."""
    model = build(name, torch.float64)
    space = MaskSpace.from_config(model.config, space_of(name))
    return model, cut_model(model, space, random_mask(space))


def packed(ids):
    """A batch as `collate` makes it of windows that hold two samples each."""
    labels = ids.masked_fill(POSITIONS == 0, -100)
    rows = zip(ids, labels, POSITIONS.expand_as(ids), strict=True)
    return collate([{"input_ids": i, "labels": lab, "position_ids": p} for i, lab, p in rows])


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["joined", "separate"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_training_masks_give_the_logits_of_each_sample_alone(name, positions):
    """Windows of attention are shorter than samples, and in most families differ between layers."""
    ids = tokens()
    parts = [ids] if positions is None else ids.split(LENGTHS, dim=1)
    for model in both(name):
        alone = torch.cat([model(part, use_cache=False).logits for part in parts], dim=1)
        use_training_attention(model)
        given = None if positions is None else positions.expand_as(ids)
        masks = training_masks(ids, given, family_of(model.config).windows(model.config))
        found = model(input_ids=ids, attention_mask=masks, position_ids=given, use_cache=False).logits
        assert_close(found, alone, rtol=0, atol=digits_of(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_logits(name):
    # Gemma multiplies by the weights of its norms in float32, and so sums their gradients.
    digits = 1e-6 if name == "gemma3_text" else digits_of(name)
    ids = tokens()
    batch = packed(ids)
    for model in both(name):
        parts = [model(part, use_cache=False).logits[:, :-1] for part in ids.split(LENGTHS, dim=1)]
        targets = torch.cat([part[:, 1:] for part in ids.split(LENGTHS, dim=1)], dim=1)
        expected = F.cross_entropy(torch.cat(parts, dim=1).flatten(0, 1), targets.flatten())
        use_training_attention(model)
        loss = causal_lm_loss(model, batch)
        assert_close(loss, expected, rtol=digits_of(name), atol=0)
        weights = list(model.parameters())
        for ours, theirs in zip(*(torch.autograd.grad(x, weights) for x in (loss, expected)), strict=True):
            assert_close(ours, theirs, rtol=0, atol=digits * max(float(theirs.abs().max()), 1))


@pytest.mark.parametrize(("name", "space_name"), SPACES)
@torch.no_grad()
def test_a_refit_mends_twins(name, space_name):
    """Removed channels and values repeat kept ones, so the refit cut model computes what the whole model does."""
    model = build(name, torch.float64)
    space = MaskSpace.from_config(model.config, space_name)
    mask = torch.ones(space.size, dtype=torch.bool)
    for layer in model.model.layers:
        for producer in family_of(model.config).mlp[:-1]:
            for parameter in layer.get_submodule(producer).parameters():
                parameter[24:] = parameter[:24]
        values, heads = layer.self_attn.v_proj, model.config.num_key_value_heads
        for parameter in values.parameters():
            by_head = parameter.view(heads, values.out_features // heads, -1)
            half = by_head.shape[1] // 2
            by_head[:, half:] = by_head[:, :half]
    for structure in space.structures:
        if structure.name in ("vo", "mlp"):
            mask[structure.start + structure.size // 2 : structure.start + structure.size] = False
    expected, damaged = model(tokens()).logits, cut_model(model, space, mask)(tokens()).logits
    wrapped = add_lora(model, space, r=1, alpha=1.0, dropout=0.0).double().eval()
    batches = [packed(tokens(seed=seed)) for seed in range(3, 9)]
    changed = refit(
        wrapped.get_base_model().get_decoder(), MaskController(wrapped, space), space, mask, batches, damping=1e-12
    )
    # In kv_group only channels are twins, and the first o_proj comes before them; disp and mlp fit no o_proj.
    assert len(changed) == {"head_dim": 6, "kv_group": 5, "disp": 3, "mlp": 3}[space_name]
    mended = cut_model(wrapped, space, mask)(tokens()).logits
    assert (damaged - expected).abs().max() > 0.01
    assert_close(mended, expected, rtol=1e-5, atol=1e-5)
