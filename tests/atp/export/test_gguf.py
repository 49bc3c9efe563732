"""The GGUF file against the model: logits from the file alone, by the rules of llama.cpp and by transformers."""

import numpy as np
import pytest
import torch
import transformers
from tiny_tokenizers import byte_level
from zeroed import random_mask, stock_model

from atp.export.gguf import architecture_of, read_back, write_gguf
from atp.families import family_of, is_cut
from atp.ground.errors import InputError
from atp.models.config import CutConfig
from atp.models.fused import split_projections
from atp.models.load import read_config, read_model, read_tokenizer
from atp.removal.cut import cut_model
from atp.spaces.space import MaskSpace
from benchmarks.gguf_forward import File, logits

VOCAB, LENGTH = 348, 20
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
# All texts here are longer than the original length, so that the long factors count.
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 6,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 3.0,
}  # fmt: skip
MULTIPLIERS = {
    "residual_multiplier": 0.22, "attention_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 0.125,
}  # fmt: skip
GEMMA = {"sliding_window": 5, "query_pre_attn_scalar": 20}
# Of three quarters of each head.
PART = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.75}
PART_LONGROPE = LONGROPE | {
    "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 3.0],
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
MODELS = {
    "llama": {},
    "llama-tied": TIED,
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "llama-linear": {"rope_parameters": LINEAR} | TIED,
    "llama-longrope": {"rope_parameters": LONGROPE},
    "llama-yarn": {"rope_parameters": YARN | {"attention_factor": 1.5}},
    "llama-yarn-whole-range": {"rope_parameters": YARN | {"truncate": False, "beta_slow": 0.2}},
    "mistral": {"sliding_window": LENGTH, "head_dim": 12},
    "qwen2": {},
    "qwen2-tied-linear": {"rope_parameters": LINEAR} | TIED,
    "qwen2-llama3": {"rope_parameters": LLAMA3},
    "qwen2-longrope": {"rope_parameters": LONGROPE},
    "qwen2-yarn": {"rope_parameters": YARN},
    "qwen3": {"head_dim": 12},
    "qwen3-yarn": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}},
    "qwen3-longrope": {"rope_parameters": LONGROPE},
    "qwen3-tied": TIED,
    "qwen3-qkv-biases": {"attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0, 1], "num_hidden_layers": 5},
    "smollm3-rope-everywhere": {"no_rope_layers": [1] * 5, "num_hidden_layers": 5},
    "granite": MULTIPLIERS,
    "granite-tied-biases": MULTIPLIERS | TIED | {"attention_bias": True, "mlp_bias": True},
    "granite-longrope": MULTIPLIERS | {"rope_parameters": LONGROPE},
    "mixtral": {"num_local_experts": 8, "sliding_window": LENGTH},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "qwen3_moe-weights": {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    "olmoe-grouped": {"num_experts": 8, "num_experts_per_tok": 3},
    "olmoe-clipped": {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4, "clip_qkv": 3.0},
    "granite-tied-llama3": MULTIPLIERS | TIED | {"rope_parameters": LLAMA3},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma2-uncapped": GEMMA | {"final_logit_softcapping": None},
    "gemma2-large": GEMMA | {"num_hidden_layers": 46},
    "gemma3_text": GEMMA | {"num_hidden_layers": 7},
    "gemma3_text-linear": GEMMA | {
        "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "llama-proportional": {
        "rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "ernie4_5": {"use_bias": True},
    "phi3": {},
    "phi3-part": TIED | {"rope_parameters": PART},
    "phi3-part-longrope": {"rope_parameters": PART_LONGROPE, "original_max_position_embeddings": 6},
    "glm": {"attention_bias": True},
    "glm-linear": {"rope_parameters": PART | {"rope_type": "linear", "factor": 2.0}},
    "glm4": {"attention_bias": True},
    "arcee": {},
    "jais2": {"hidden_act": "silu"},
    "glm4-yarn": {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    "gemma3_text-alternating": GEMMA | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
}  # fmt: skip
# The architecture of the whole model, of one cut to equal widths, and of one with a width per layer; None is refused.
EXPECTED = {
    "llama": ("llama", "llama", "deci"),
    "mistral": ("llama", "llama", "deci"),
    "qwen2": ("qwen2", "llama", "deci"),
    "qwen2-llama3": ("llama", "llama", "deci"),
    "qwen2-longrope": ("llama", "llama", "deci"),
    "qwen3": ("qwen3", "qwen3", None),
    "qwen3-qkv-biases": (None, None, None),
    "qwen3-longrope": (None, None, None),
    "smollm3": ("smollm3", "smollm3", None),
    "smollm3-rope-everywhere": ("llama", "llama", "deci"),
    "granite": ("granite", "granite", "deci"),
    "mixtral": ("llama", "llama", None),
    "qwen3_moe": ("qwen3moe", "qwen3moe", None),
    "qwen3_moe-weights": (None, None, None),
    "olmoe": ("olmoe", "olmoe", None),
    "olmoe-grouped": (None, None, None),
    "olmoe-clipped": (None, None, None),
    "gemma2": ("gemma2", "gemma2", None),
    "gemma2-uncapped": (None, None, None),
    "gemma3_text": ("gemma3", "gemma3", None),
    "gemma3_text-alternating": (None, None, None),
    "ernie4_5": ("llama", "llama", "deci"),
    "phi3": ("llama", "llama", "deci"),
    "glm": ("llama", "llama", "deci"),
    "glm4": ("glm4", "glm4", None),
    "glm4-yarn": (None, None, None),
    "arcee": ("arcee", "arcee", None),
    "jais2": (None, None, None),
}
WIDTHS = ("whole", "equal", "unequal")
CASES = [
    (name, widths, architecture)
    for name in MODELS
    for widths, architecture in zip(WIDTHS, EXPECTED.get(name) or EXPECTED[name.split("-")[0]], strict=True)
]


def tiny(name, widths="whole", **changes):
    """A model of random weights, cut in its family's space unless it is whole."""
    values = {"vocab_size": VOCAB} | MODELS[name] | changes
    model = split_projections(stock_model(name.split("-")[0], dtype=torch.float32, **values))
    if widths == "whole":
        return model
    space = MaskSpace.from_config(model.config, family_of(model.config).space)
    mask = random_mask(space)
    if widths == "equal":
        mask[:] = False
        for structure in space.structures:
            shift = torch.arange(structure.size // 2) + structure.layer % 2  # not the same ones in all layers
            mask[structure.start + shift] = True
    return cut_model(model, space, mask)


# (layer, block) pairs that are gone: in the first layer, in the last, all of a layer, all attention, all but one.
GONE = {
    "first attention": [(0, "self_attn")],
    "last MLP": [(2, "mlp")],
    "one of each": [(1, "self_attn"), (0, "mlp")],
    "first layer": [(0, "self_attn"), (0, "mlp")],
    "last layer": [(2, "self_attn"), (2, "mlp")],
    "all attention": [(0, "self_attn"), (1, "self_attn"), (2, "self_attn")],
    "all but one": [(0, "self_attn"), (0, "mlp"), (1, "mlp"), (2, "self_attn"), (2, "mlp")],
}
WITHOUT_BLOCKS = [(name, gone) for name in ("llama-tied", "llama-biases", "mistral", "granite") for gone in GONE]


def without_blocks(name, gone, widths="random"):
    """A model cut to a random width per layer, or to whole ones, without these blocks."""
    model = stock_model(name.split("-")[0], dtype=torch.float32, **{"vocab_size": VOCAB} | MODELS[name])
    space = MaskSpace.from_config(model.config, "kv_group")
    mask = random_mask(space) if widths == "random" else torch.ones(space.size, dtype=torch.bool)
    for structure in space.structures:
        if (structure.layer, structure.block) in GONE[gone]:
            mask[structure.span] = False
    return cut_model(model, space, mask)


def shapes_of(model):
    return model.config if is_cut(model.config) else CutConfig.from_whole(model.config)


def write(model, path, dtype="f32", tokenizer=None):
    config = shapes_of(model)
    architecture = architecture_of(config, "the model")
    facts = {"name": "Tiny", "license": "mit", "language": "en", "base_model": "someone/Small"}
    remarks = write_gguf(model, config, tokenizer or byte_level(), architecture, dtype, path, facts)
    return architecture.name, remarks


def tokens(windows=3):
    return torch.randint(3, VOCAB, (windows, LENGTH), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def assert_same_logits(file, model, tolerance):
    ids = tokens()
    expected = model(ids).logits
    assert (logits(file, ids) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("name", "widths", "architecture"), [case for case in CASES if case[2]])
def test_the_file_computes_the_models_logits(tmp_path, name, widths, architecture):
    model = tiny(name, widths)
    write(model, tmp_path / "model.gguf")
    file = File(tmp_path / "model.gguf")
    assert file.architecture == architecture
    assert_same_logits(file, model, 1e-5)
    assert file.used == file.tensors.keys(), "llama.cpp refuses a file with tensors that it does not read"
    assert set(file.types.values()) == {"F32"}
    folded = name.startswith("granite") and architecture == "deci"
    assert ("output.weight" not in file.tensors) == (model.config.tie_word_embeddings and not folded)
    scaled = name.endswith(("llama3", "whole-range", "proportional", "part")) or name.startswith("glm-")
    assert ("rope_freqs.weight" in file.tensors) == (scaled or name == "glm")


@pytest.mark.parametrize(("name", "gone"), WITHOUT_BLOCKS)
def test_blocks_that_are_gone_are_left_out_or_zero(tmp_path, name, gone):
    model = without_blocks(name, gone)
    assert write(model, tmp_path / "model.gguf", "f32")[0] == "deci"
    file = File(tmp_path / "model.gguf")
    assert_same_logits(file, model, 1e-5)
    assert file.used == file.tensors.keys(), "llama.cpp refuses a file with tensors that it does not read"
    whole = [layer for layer in range(3) if {(layer, "self_attn"), (layer, "mlp")} <= {*GONE[gone]}]
    assert file.keys["deci.block_count"] == 3 - len(whole)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "smollm3"])
def test_other_architectures_hold_no_layer_without_attention_and_none_at_all_that_is_left_out(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} lacks layers without attention or MLP.*: use its folder with trans"):
        write(without_blocks(name, "first attention", "whole"), tmp_path / "model.gguf")
    model = without_blocks("qwen3", "last layer", "whole")
    assert write(model, tmp_path / "model.gguf")[0] == "qwen3"
    assert_same_logits(File(tmp_path / "model.gguf"), model, 1e-5)


def test_a_model_that_was_cut_twice_is_exported_too(tmp_path):
    first = tiny("llama-biases", "unequal")
    space = MaskSpace.from_config(first.config, "kv_group")
    model = cut_model(first, space, random_mask(space, seed=4))
    assert write(model, tmp_path / "model.gguf")[0] == "deci"
    assert_same_logits(File(tmp_path / "model.gguf"), model, 1e-5)


@pytest.mark.parametrize(("name", "widths"), [case[:2] for case in CASES if not case[2]])
def test_a_model_that_no_architecture_holds_is_refused(tmp_path, name, widths):
    with pytest.raises(InputError, match="no architecture of llama.cpp holds it .*: use its folder with transformers"):
        write(tiny(name, widths), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("widths", ["equal", "unequal"])
@pytest.mark.parametrize(
    ("dtype", "kind", "tolerance"),
    [("f16", "F16", 5e-3), ("bf16", "BF16", 3e-2), ("q8_0", "Q8_0", 1e-1), ("q4_1", "Q4_1", 1)],
)
def test_narrow_weights_are_within_their_rounding(tmp_path, widths, dtype, kind, tolerance):
    model = tiny("llama-biases", widths)
    write(model, tmp_path / "exact.gguf")
    _, remarks = write(model, tmp_path / "narrow.gguf", dtype)
    exact, narrow = File(tmp_path / "exact.gguf"), File(tmp_path / "narrow.gguf")
    assert narrow.tensors.keys() == exact.tensors.keys()
    fallen = 0
    for name, values in exact.tensors.items():
        found, error = narrow.types[name], (narrow.tensors[name] - values).abs()
        if values.dim() == 1:
            assert found == "F32" and not error.any()
            continue
        if dtype[0] == "q" and values.shape[1] % 32:
            assert found == "F16"
            fallen += 1
        else:
            assert found == ("Q8_0" if name in ("token_embd.weight", "output.weight") and dtype == "q4_1" else kind)
        if found == "Q8_0":
            blocks = values.view(-1, 32)
            # Half a step of the block, and the float16 rounding of the step itself.
            largest = blocks.abs().amax(1, keepdim=True)
            assert (error.view(-1, 32) <= largest * (0.5 / 127 + 2**-11) * 1.01).all()
        elif found == "Q4_1":
            blocks = values.view(-1, 32)
            # Half a step of 15 between the least and the largest, and the float16 rounding of the step and the least.
            spread, largest = blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True), blocks.abs().amax(1, True)
            assert (error.view(-1, 32) <= spread * (0.5 / 15 + 2**-11) + largest * 2**-11 + 1e-7).all()
        else:
            bits = {"F16": 11, "BF16": 8}[found]
            assert (error <= values.abs() * 2.0**-bits + 2**-25).all()
    assert_same_logits(narrow, model, tolerance)
    assert len(remarks) == (1 if fallen else 0)
    if fallen:
        assert remarks[0].startswith(f"{fallen} of 23 matrices are f16")


@pytest.mark.parametrize(
    ("dtype", "name", "widths"),
    # The large ones take seconds.
    [(dtype, *case[:2]) for case in CASES if case[2] for dtype in ("f32", "q4_1") if "large" not in case[0]],
)
def test_a_model_takes_back_what_its_file_holds(tmp_path, dtype, name, widths):
    """Then it computes what the file alone says, whatever order and factor the architecture wants."""
    source, model = tiny(name, widths), tiny(name, widths)
    write(source, tmp_path / "model.gguf", dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    config = shapes_of(model)
    read_back(model, config, architecture_of(config, "the model"), tmp_path / "model.gguf")
    # Granite's tied weights lie twice in a file of `deci`, multiplied and rounded apart.
    apart = name.startswith("granite") and architecture_of(config, "").name == "deci" and dtype != "f32"
    assert_same_logits(File(tmp_path / "model.gguf"), model, 1e-2 if apart else 1e-5)
    if dtype == "f32":
        for (key, exact), found in zip(source.state_dict().items(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(found, exact, msg=key)


def test_weights_beyond_float16_are_refused(tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 7e4
    with pytest.raises(InputError, match=r"blk.1.ffn_up.weight holds values beyond float16: use --dtype bf16 or f32"):
        write(model, tmp_path / "model.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "qwen3-tied", "qwen3_moe"])
@pytest.mark.parametrize("widths", ["whole", "equal"])
def test_transformers_reads_it_back(tmp_path, name, widths):
    if (name, widths) == ("qwen2", "equal"):
        pytest.skip("it becomes a llama with biases, which transformers leaves out")
    # transformers takes a head_dim of 128 for every Qwen3, and experts of width 768 for every Qwen3-MoE.
    changes = {"head_dim": 128} if name.startswith("qwen3") else {}
    model = tiny(name, widths, **changes, **({"moe_intermediate_size": 768} if name == "qwen3_moe" else {}))
    write(model, tmp_path / "model.gguf")
    found = read_model(tmp_path, torch.float32, "model.gguf")
    with torch.no_grad():
        expected, actual = model(tokens()).logits, found(tokens()).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_config_and_tokenizer_come_from_one_reading_of_the_header(tmp_path, monkeypatch, name):
    """A vocabulary of 50,000 tokens takes seconds to read."""
    write(tiny(name), tmp_path / "model.gguf")
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=str(tmp_path / "model.gguf"))
    readings, read = [], transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint
    monkeypatch.setattr(
        transformers.modeling_gguf_pytorch_utils, "load_gguf_checkpoint",
        lambda *values, **options: readings.append(values) or read(*values, **options),
    )  # fmt: skip
    read_config(tmp_path, "model.gguf")
    found = read_tokenizer(tmp_path, "model.gguf")
    assert len(readings) == 1 and type(found) is type(stock)
    assert found.backend_tokenizer.to_str() == stock.backend_tokenizer.to_str()
    assert found.special_tokens_map == stock.special_tokens_map and found.chat_template == stock.chat_template


def test_what_the_file_says_of_the_model(tmp_path):
    model = tiny("mistral", "unequal")
    _, remarks = write(model, tmp_path / "model.gguf", "q8_0")
    keys = File(tmp_path / "model.gguf").keys
    shapes = [model.config.layer_shape(layer) for layer in range(3)]
    expected = {
        "general.type": "model", "general.name": "Tiny", "general.license": "mit", "general.languages": ["en"],
        "general.base_model.count": 1, "general.base_model.0.name": "Small",
        "general.base_model.0.repo_url": "https://huggingface.co/someone/Small",
        "general.file_type": 7, "general.quantization_version": 2, "deci.block_count": 3,
        "deci.embedding_length": 32, "deci.vocab_size": VOCAB, "deci.attention.key_length": 12,
        "deci.attention.value_length": 12, "deci.rope.dimension_count": 12, "deci.context_length": LENGTH,
        "deci.attention.head_count": [shape.num_attention_heads for shape in shapes],
        "deci.attention.head_count_kv": [shape.num_key_value_heads for shape in shapes],
        "deci.feed_forward_length": [shape.intermediate_size for shape in shapes],
    }  # fmt: skip
    assert {key: keys.get(key) for key in expected} == expected
    assert np.isclose(keys["deci.attention.layer_norm_rms_epsilon"], model.config.rms_norm_eps)
    assert keys["deci.rope.freq_base"] == model.config.rope_parameters["rope_theta"]
    assert remarks[0].startswith(f"the context length in the file is {LENGTH} of 64 tokens")


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        (LONGROPE, "llama.cpp takes the long factors of RoPE where it is started with a context of more than 6 tokens"),
        (
            {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
            "llama.cpp does not scale RoPE with the length of a text, as type dynamic does beyond 64 tokens",
        ),
    ],
)
def test_rope_that_goes_by_the_length_is_said(tmp_path, rope, says):
    model = tiny("llama", "unequal", rope_parameters=rope)
    _, remarks = write(model, tmp_path / "model.gguf")
    assert len(remarks) == 1 and remarks[0].startswith(says)
    assert_same_logits(File(tmp_path / "model.gguf"), model, 1e-5)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            "head_dim",
            r"its layer \d has (queries and keys|values) of width \d in heads of 8, .*: cut in space kv_group",
        ),
        ("disp", r"the blocks of its layer 0 read or write a part of the hidden state, .*: cut in space kv_group"),
    ],
)
def test_other_spaces_are_refused(tmp_path, space, message):
    model = tiny("llama")
    mask_space = MaskSpace.from_config(model.config, space)
    cut = cut_model(model, mask_space, random_mask(mask_space))
    with pytest.raises(InputError, match=message):
        write(cut, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_channels_of_experts_are_written_where_all_layers_have_as_many(tmp_path, name):
    model = tiny(name)
    space = MaskSpace.from_config(model.config, "expert_channels")
    draw = torch.Generator().manual_seed(0)
    for counts in ((8, 8, 8), (8, 16, 8)):
        mask = torch.zeros(space.size, dtype=torch.bool)
        for structure, count in zip(space.structures, counts, strict=True):
            best = structure.ranking(torch.rand(structure.size, generator=draw))
            mask[structure.start + best[: count * structure.groups]] = True
        cut = cut_model(model, space, mask)
        if len(set(counts)) == 1:
            write(cut, tmp_path / "model.gguf")
            assert_same_logits(File(tmp_path / "model.gguf"), cut, 1e-5)
        else:
            with pytest.raises(InputError, match="widths per layer|differ"):
                write(cut, tmp_path / "other.gguf")


def test_a_mask_of_whole_heads_in_another_space_is_written(tmp_path):
    model = tiny("llama")
    space = MaskSpace.from_config(model.config, "head_dim")
    mask = torch.ones(space.size, dtype=torch.bool)
    mlp = [structure for structure in space.structures if structure.name == "mlp"]
    mask[mlp[1].start : mlp[1].start + 7] = False
    cut = cut_model(model, space, mask)
    write(cut, tmp_path / "model.gguf")
    assert_same_logits(File(tmp_path / "model.gguf"), cut, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, "its activation is gelu_pytorch_tanh, and llama.cpp has silu"),
        ({"shortcuts": True}, "it has a matrix on each residual connection"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(changes, message):
    config = CutConfig.from_whole(tiny("llama").config, **changes)
    with pytest.raises(InputError, match=f"run 7 cannot become a GGUF file, because {message}"):
        architecture_of(config, "run 7")
