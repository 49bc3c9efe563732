"""Every type of RoPE through the cut: masked, cut, saved and loaded, also where layers differ in heads."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from zeroed import KV_HEADS, random_mask, stock_model, tokens, zeroed

from atp.models.load import read_model
from atp.models.stock import save_model
from atp.removal.cut import cut_model
from atp.sharding.shards import sharded_copy
from atp.spaces.space import MaskSpace

ORIGINAL = 12  # positions before the scaling; windows are longer
ROPE = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 3.0},
    "yarn-attention-factor": {
        "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.5, "truncate": False,
    },
    "yarn-mscale": {
        "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "mscale": 0.7, "mscale_all_dim": 0.3,
    },
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "seed_oss")
SPACES = ("head_dim", "kv_group", "disp")
CASES = [("llama", rope, space) for rope in ROPE for space in SPACES]
CASES += [(family, rope, "kv_group") for family in FAMILIES[1:] for rope in ("dynamic", "yarn", "longrope")]
CASES += [(family, "longrope", "head_dim") for family in ("qwen2", "smollm3", "granite")]


def settings(rope):
    """What a config has of a type of RoPE."""
    positions = ORIGINAL if rope == "dynamic" else 64
    parameters = {"rope_type": rope.partition("-")[0], "rope_theta": 100.0, **ROPE[rope]}
    return {"rope_parameters": parameters, "max_position_embeddings": positions}


def pair(family, rope, space_name):
    """The zeroed stock model and the cut one; of its three layers one keeps fewer heads than the others."""
    model = stock_model(family, **settings(rope))
    space = MaskSpace.from_config(model.config, space_name)
    mask = random_mask(space)
    for structure in space.structures:
        if structure.name == "kv_group":
            mask[structure.span] = torch.arange(KV_HEADS) >= structure.layer
            mask[structure.start + KV_HEADS - 1] = True
    return zeroed(model, space.kept_indices(mask)), cut_model(model, space, mask)


def passes(model):
    """Logits of texts below the original length, beyond it, and below it again: some types go by what they saw."""
    with torch.no_grad():
        return [model(ids).logits for ids in (tokens(2, ORIGINAL - 4), tokens(2, 2 * ORIGINAL), tokens(2, 5))]


def test_every_type_that_transformers_has_is_here():
    assert {rope.partition("-")[0] for rope in ROPE} == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize(("family", "rope", "space_name"), CASES)
def test_the_cut_model_computes_what_the_masked_one_does(family, rope, space_name):
    truth, cut = pair(family, rope, space_name)
    expected = passes(truth)
    for actual, logits in zip(passes(cut), expected, strict=True):
        assert_close(actual, logits, rtol=0, atol=1e-10)
    assert expected[1].abs().max() > 0.1
    prompt = tokens(2, ORIGINAL - 3)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    # Where frequencies change with length, transformers' own cache holds keys that were rotated before they did.
    for cache in ({}, {"use_cache": False}):
        assert torch.equal(cut.generate(prompt, **options, **cache), truth.generate(prompt, **options, **cache)), cache


def test_a_folder_loads_as_the_same_model(tmp_path):
    for family, rope, space_name in [case for case in CASES if case[0] == "llama" and case[2] != "disp"]:
        cut, folder = pair(family, rope, space_name)[1].float(), tmp_path / f"{rope}-{space_name}"
        save_model(cut, folder)
        loaded = [passes(read_model(folder, torch.float32)), passes(AutoModelForCausalLM.from_pretrained(folder))]
        for ours, theirs, before in zip(*loaded, passes(cut), strict=True):
            assert torch.equal(ours, theirs), folder.name
            assert_close(ours, before, rtol=0, atol=1e-5, msg=folder.name)


@pytest.fixture
def one_process():
    """This process as a group of its own, in which a model can be in shards."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rope", ["yarn", "longrope"])
def test_a_cut_model_is_spread_over_processes(one_process, rope):
    _, cut = pair("llama", rope, "kv_group")
    expected = passes(cut)
    for actual, logits in zip(passes(sharded_copy(cut, torch.device("cpu"))), expected, strict=True):
        assert_close(actual, logits)
