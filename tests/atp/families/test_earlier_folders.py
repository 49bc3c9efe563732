"""Folders of cut models as earlier versions wrote them: one class of ours for all families, told apart by switches.

`earlier_configs.json` holds config.json files that such a version wrote of the tiny models here, cut by `random_mask`.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny_families import build, random_mask, tokens
from transformers import AutoModelForCausalLM

from atp.families import FAMILIES, cut_type
from atp.models.load import read_model
from atp.models.registration import FAMILIES as KNOWN_EARLY
from atp.removal import cut_model
from atp.spaces.space import MaskSpace

EARLIER = json.loads((Path(__file__).parent / "earlier_configs.json").read_text())


@pytest.mark.parametrize("case", EARLIER)
def test_a_folder_loads_as_what_it_was(tmp_path, case):
    name, space_name = case.split("-")
    model = build(name)
    space = MaskSpace.from_config(model.config, space_name)
    cut = cut_model(model, space, random_mask(space))
    cut.save_pretrained(tmp_path)
    content = EARLIER[case]
    assert content["model_type"] == "atp_llama" and content["family"] == name
    (tmp_path / "config.json").write_text(json.dumps(content))
    for again in (read_model(tmp_path, "auto"), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert again.config.model_type == cut_type(name) and type(again) is type(cut)
        with torch.no_grad():
            assert torch.equal(again(tokens()).logits, cut(tokens()).logits)
        mine, theirs = again.config.to_dict(), cut.config.to_dict()
        differ = {key for key in theirs if mine[key] != theirs[key]}
        assert differ <= {"_name_or_path", "architectures"}


@pytest.mark.parametrize(("options", "family"), [({}, "llama"), ({"sliding_window": 4}, "mistral")])
def test_a_folder_from_before_there_were_families_loads(tmp_path, options, family):
    """Its config.json has widths under another key, and nothing that only later families need."""
    model = build(family, **{"head_dim": 8} | ({} if options else {"attention_bias": False, "mlp_bias": False}))
    space = MaskSpace.from_config(model.config, "kv_group")
    cut = cut_model(model, space, random_mask(space))
    cut.save_pretrained(tmp_path)
    plain = ("vocab_size", "hidden_size", "num_hidden_layers", "rope_parameters", "max_position_embeddings", "head_dim")
    content = {key: getattr(cut.config, key) for key in plain} | {"model_type": "atp_llama", **options}
    shapes = [cut.config.layer_shape(layer) for layer in range(cut.config.num_hidden_layers)]
    keys = ("num_attention_heads", "num_key_value_heads", "qk_pairs", "v_head_dim", "intermediate_size")
    content["layer_shapes"] = [{key: getattr(shape, key) for key in keys} for shape in shapes]
    content |= {key: content["layer_shapes"][0][key] for key in ("num_attention_heads", "num_key_value_heads")}
    (tmp_path / "config.json").write_text(json.dumps(content))
    again = read_model(tmp_path, "auto")
    assert again.config.model_type == cut_type(family)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, cut(tokens()).logits)


def test_transformers_learns_of_every_family_before_its_class_exists():
    assert set(KNOWN_EARLY) == FAMILIES.keys()
