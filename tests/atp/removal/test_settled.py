"""After settle cutting changes nothing: hard masks with removed LoRA groups at zero equal the cut model."""

import pytest
import torch
from torch.testing import assert_close
from zeroed import random_mask, stock_model, tokens

from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.lora.regularizers.lasso import LoraGroups
from atp.removal.cut import cut_model, cut_state_dict
from atp.spaces.space import MaskSpace


def settled(space_name):
    """A masked model after a few LoRA steps and the prox; its optimizer, space and mask."""
    model = stock_model(dtype=torch.float32)
    space = MaskSpace.from_config(model.config, space_name)
    mask = random_mask(space)
    model = add_lora(model, space, r=3, alpha=6.0, dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with MaskController(model, space).masks(mask, "hard"):
        for _ in range(3):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    groups = LoraGroups(model, space)
    left = groups.largest_removed_norm(mask)
    groups.prox_(mask, 2 * left)
    return model.eval(), optimizer, space, mask, left


@pytest.mark.parametrize("space_name", ["head_dim", "kv_group", "disp"])
def test_masked_base_path_equals_the_cut_model(space_name):
    model, _, space, mask, left = settled(space_name)
    assert left > 1e-3, "LoRA of removed structures learned while it could"
    with torch.no_grad():
        with MaskController(model, space).masks(mask, "hard"):
            expected = model(input_ids=tokens()).logits
        plain = model(input_ids=tokens()).logits
        cut = cut_model(model, space, mask)
        assert_close(cut(input_ids=tokens()).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (plain - expected).abs().max() > 1e-2, "the mask must matter in this test"


@pytest.mark.parametrize("space_name", ["head_dim", "kv_group", "disp"])
def test_cut_moments_fit_the_cut_parameters(space_name):
    model, optimizer, space, mask, _ = settled(space_name)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    moments = {
        f"{name}.{key}": optimizer.state[p][key]
        for name, p in zip(names, optimizer.param_groups[0]["params"], strict=True)
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    cut = cut_model(model, space, mask)
    shrunk = cut_state_dict(moments, space, mask)
    smaller = 0
    for name, parameter in cut.named_parameters():
        assert parameter.requires_grad == (name in names), name
        if name in names:
            assert shrunk[f"{name}.exp_avg"].shape == shrunk[f"{name}.exp_avg_sq"].shape == parameter.shape
            assert shrunk[f"{name}.step"] == 3
            smaller += parameter.numel() < model.get_parameter(name).numel()
    assert smaller > 0
