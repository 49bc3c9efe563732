"""Cut models with equal layers as classes of transformers' own: the same logits, without this package."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, LAYERS, build, space_of, tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from atp.families import family_of, is_cut
from atp.models.stock import as_stock, save_model
from atp.removal import cut_model
from atp.spaces.space import MaskSpace

CLASSES = {
    "llama": "SeedOssForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "SeedOssForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM", "granite": "GraniteForCausalLM",
    "seed_oss": "SeedOssForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM", "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM", "ernie4_5": "Ernie4_5ForCausalLM", "exaone4": "Exaone4ForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM", "phi3": "Phi3ForCausalLM", "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM", "arcee": "ArceeForCausalLM", "nemotron": "NemotronForCausalLM",
    "jais2": "Jais2ForCausalLM", "starcoder2": "Starcoder2ForCausalLM", "apertus": "ApertusForCausalLM",
}  # fmt: skip
PLAIN = {"llama": {}, "qwen2": {"use_sliding_window": False}}
# A folder must load where nothing of this project can be imported.
LOAD = """
import sys
from pathlib import Path
sys.modules["atp"] = sys.modules["atp_kernels"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = load_file(folder / "ids.safetensors")["ids"]
    with torch.no_grad():
        logits, tokens = model(ids).logits, model.generate(ids, do_sample=False, max_new_tokens=5)
    save_file({"logits": logits, "tokens": tokens}, folder / "found.safetensors")
    print(folder.name, type(model).__name__)
"""


def equal_mask(space, kept, seed=3):
    """Different decisions in every layer, the same number of them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(space.size, dtype=torch.bool)
    for structure in space.structures:
        order = torch.randperm(structure.size, generator=generator)
        mask[structure.start + order[: kept[structure.name]]] = True
    return mask


def cut(name, kept=None, space_name=None, **options):
    model = build(name, **options)
    space_name = space_name or space_of(name)
    space = MaskSpace.from_config(model.config, space_name)
    return cut_model(model, space, equal_mask(space, kept or {"kv_group": 1, "mlp": 17}))


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_layers_compute_the_same_in_a_stock_class(name):
    model = cut(name, **PLAIN.get(name, {}))
    stock = as_stock(model)
    assert type(stock).__name__ == CLASSES[name] and is_cut(model.config)
    unlike = {p.data_ptr() for p in stock.parameters()} ^ {p.data_ptr() for p in model.parameters()}
    joined = [p for p in family_of(model.config).fused.values()]
    assert len(unlike) == LAYERS * sum(len(parts) + 1 for parts in joined), "all other weights are shared"
    with torch.no_grad():
        assert_close(stock(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-5 if joined else 0.0)
        greedy = {"do_sample": False, "max_new_tokens": 6}
        assert torch.equal(stock.generate(tokens(), **greedy), model.generate(tokens(), **greedy))


@pytest.mark.slow
def test_folders_load_where_this_package_cannot_be_imported(tmp_path):
    """All families in one process, most of whose time is imports."""
    models = {name: cut(name, **PLAIN.get(name, {})) for name in FAMILIES}
    for name, model in models.items():
        save_model(model, tmp_path / name)
        save_file({"ids": tokens()}, tmp_path / name / "ids.safetensors")
    folders = [str(tmp_path / name) for name in models]
    done = subprocess.run([sys.executable, "-c", LOAD, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{name} {CLASSES[name]}" for name in models]
    for name, model in models.items():
        found = load_file(tmp_path / name / "found.safetensors")
        with torch.no_grad():
            expected = model(tokens()).logits
            assert (found["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max(), name
            assert torch.equal(found["tokens"], model.generate(tokens(), do_sample=False, max_new_tokens=5)), name


def test_plain_llama_is_a_mistral_without_a_window(tmp_path):
    """Llama's own class wants heads that divide hidden_size."""
    options = {"attention_bias": False, "mlp_bias": False, "num_attention_heads": 6, "num_key_value_heads": 3}
    stock = as_stock(cut("llama", {"kv_group": 2, "mlp": 16}, hidden_size=30, **options))
    assert type(stock).__name__ == "MistralForCausalLM"
    save_model(stock, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["sliding_window"] is None and written["head_dim"] == 8 and written["num_attention_heads"] == 4
    assert "per_layer_config" not in written and not any("atp" in str(value).lower() for value in written.values())


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default", "rope_theta": 500.0},
             {"rope_type": "llama3", "rope_theta": 777.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}], ids=["default", "llama3"]
)  # fmt: skip
def test_rope_is_written_where_other_readers_look(tmp_path, rope):
    model = cut("llama", rope_parameters=rope, attention_bias=False, mlp_bias=False)
    save_model(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == rope["rope_theta"] and written["rope_parameters"] == rope
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert written["rope_scaling"] == (scaling if rope["rope_type"] == "llama3" else None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == rope
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_what_no_stock_class_computes_stays_as_it_is():
    llama = build("llama")
    space = MaskSpace.from_config(llama.config, "kv_group")
    mask = equal_mask(space, {"kv_group": 1, "mlp": 17})
    mask[space.structures[-1].span] = True  # the last layer has a wider MLP
    uneven = cut_model(llama, space, mask)
    narrow_heads = cut("mistral", {"qk": 3, "vo": 5, "mlp": 17}, "head_dim")
    sliding = cut("qwen2")
    # Gemma's own class wants heads that divide hidden_size.
    heads = cut("gemma2", {"kv_group": 3, "mlp": 16}, num_attention_heads=4, num_key_value_heads=4)
    for model in (uneven, narrow_heads, sliding, llama, heads):
        assert as_stock(model) is model


def test_tied_embeddings_stay_tied_in_memory_and_on_disk(tmp_path):
    stock = as_stock(cut("granite"))
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    save_model(stock, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == stock.lm_head.weight.shape


def test_dtype_and_mode_are_kept():
    model = cut("mistral", dtype=torch.bfloat16)
    assert as_stock(model).dtype == torch.bfloat16 and not as_stock(model).training
    assert as_stock(model.train()).training
