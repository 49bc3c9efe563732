"""8-bit weights of a cut of every family in every space: written, read back, and near the model's logits."""

import pytest
import torch
from tiny_families import SPACES, build, random_mask, tokens
from transformers import AutoModelForCausalLM

from atp.export.quantized import SCHEMES
from atp.families import family_of
from atp.models.load import read_model
from atp.models.stock import save_model
from atp.removal import cut_model
from atp.spaces.space import MaskSpace


@pytest.mark.parametrize(("name", "space"), SPACES)
@torch.no_grad()
def test_int8_of_a_cut_model_is_read_back(tmp_path, name, space):
    pytest.importorskip("torchao")
    whole = build(name)
    spaces = MaskSpace.from_config(whole.config, space)
    cut = cut_model(whole, spaces, random_mask(spaces))
    expected = cut(tokens()).logits
    save_model(cut, tmp_path / "cut")
    settings = SCHEMES["int8"].settings(["lm_head"], cut.dtype)
    quantized = read_model(tmp_path / "cut", "auto", quantization=settings)
    save_model(quantized, tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert type(again) is type(quantized)
    found = again(tokens()).logits
    assert torch.equal(found, quantized(tokens()).logits)
    # Without a gate the activation is a square, which doubles relative errors.
    most = 0.1 if len(family_of(whole.config).mlp) == 3 else 0.2
    assert 0 < (found - expected).abs().max() < most * expected.abs().max()
