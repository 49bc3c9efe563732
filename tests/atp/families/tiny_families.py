"""A tiny random model of every family, with everything switched on that sets the family apart."""

import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.models.fused import split_projections
from atp.removal import cut_model
from atp.spaces import EXPERT_SPACES, space_names

VOCAB, LAYERS = 64, 3
SLIDING = {"use_sliding_window": True, "sliding_window": 4}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 8},
    "mistral": {"sliding_window": 4, "head_dim": 12},
    "qwen2": SLIDING | {"max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": SLIDING | {"max_window_layers": 2, "head_dim": 12, "attention_bias": True},
    "smollm3": SLIDING | {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": False, "attention_bias": True},
    "seed_oss": {"attention_bias": True, "attention_out_bias": False, "head_dim": 12, "residual_dropout": 0.0,
                 "attention_dropout": 0.0},
    "granite": {
        "residual_multiplier": 0.22, "attention_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 0.25,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "sliding_window": 4, "head_dim": 12, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0, "attention_bias": True,
    },
    "gemma3_text": {
        "sliding_window": 4, "head_dim": 12, "query_pre_attn_scalar": 20, "attention_bias": True,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        },
    },
    "olmo2": {"attention_bias": True},
    "olmo3": {
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_bias": True,
    },
    "ministral": {
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "head_dim": 12,
    },
    "ministral3": {
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 4,
            "max_position_embeddings": 64, "llama_4_scaling_beta": 0.3, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "ernie4_5": {"head_dim": 12, "use_bias": True},
    "hunyuan_v1_dense": {"head_dim": 12, "attention_bias": True},
    "exaone4": {
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "head_dim": 12,
    },
    "phi3": {"sliding_window": 4, "resid_pdrop": 0.1},
    "glm": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "nemotron": {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "jais2": {"num_key_value_heads": 2},
    "starcoder2": {"sliding_window": 4, "residual_dropout": 0.0, "tie_word_embeddings": True},
    "apertus": {"attention_bias": True},
}  # fmt: skip
EXPERTS = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 4, "head_dim": 12},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 12,
                  "norm_topk_prob": True, "attention_bias": True},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.7},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 4, "head_dim": 12,
                "swiglu_limit": 1.0},
}  # fmt: skip
"""The families whose MLPs are experts, which have a space of their own."""
INEXACT = {
    "qwen3": {"head_dim"}, "gemma2": {"disp"}, "gemma3_text": {"head_dim", "disp"},
    "olmo2": {"kv_group", "head_dim", "disp"}, "olmo3": {"kv_group", "head_dim", "disp"}, "ministral3": {"head_dim"},
    "nemotron": {"head_dim"}, "apertus": {"head_dim"}, "glm": {"head_dim"}, "glm4": {"head_dim", "disp"},
    "ernie4_5": {"head_dim"}, "hunyuan_v1_dense": {"head_dim"}, "exaone4": {"head_dim", "disp"},
}  # fmt: skip
SPACES = [
    (name, space)
    for name in FAMILIES
    for space in space_names()
    if space not in EXPERT_SPACES and space not in INEXACT.get(name, ())
]
"""Every family with every space that is exact in it."""


def space_of(name):
    """The family's space that takes most: KV groups and MLP channels, or these alone."""
    return "kv_group" if (name, "kv_group") in SPACES else "mlp"


def build(name, dtype=torch.float32, scale=0.2, **overrides):
    """The model that is pruned: transformers' own, with fused projections split."""
    return split_projections(stock(name, dtype, scale, **overrides))


def stock(name, dtype=torch.float32, scale=0.2, **overrides):
    """transformers' model in evaluation mode, with biases that are not zero and norm weights that are not one."""
    values = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": scale,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **values | (FAMILIES | EXPERTS)[name] | overrides)
    )
    if name in EXPERTS and dtype == torch.float64:
        model.set_experts_implementation("eager")  # grouped products of torch have no float64
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.data = parameter.to(dtype)  # not the RoPE frequencies, which a load leaves in float32
    return model.eval()


def tokens(windows=3, length=14, seed=2):
    return torch.randint(3, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


def random_mask(space, seed=1, keep=0.6):
    """A random mask that keeps at least one decision of every structure."""
    mask = torch.rand(space.size, generator=torch.Generator().manual_seed(seed)) < keep
    for structure in space.structures:
        if structure.size:  # of a block that the layer lacks there is none
            mask[structure.start] = True
    return mask


def with_adapter(model, space):
    """The model in float64 with a random adapter of rank 2."""
    wrapped = add_lora(model, space, r=2, alpha=4.0, dropout=0.0).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for n, p in wrapped.named_parameters() if "lora_" in n):
        parameter.data = 0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return wrapped


@torch.no_grad()
def cut_as_masked(wrapped, space, mask):
    """The cut model, which computes what the masked one does; and the logits of each form of the mask.

    Form "hard" slices the base weights where "base" masks them; only "sum" masks the adapter.
    """
    controller, ids, found = MaskController(wrapped, space), tokens(), {}
    for form in ("sum", "base", "hard"):
        with controller.masks(mask, form):
            found[form] = wrapped(ids).logits
    cut = cut_model(wrapped, space, mask)
    assert_close(found["sum"], cut(ids).logits, rtol=0, atol=1e-10)
    assert_close(found["hard"], found["base"], rtol=0, atol=1e-10)
    return cut, found
