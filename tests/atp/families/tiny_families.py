"""A tiny random model of every family, with everything switched on that sets the family apart."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
}  # fmt: skip
EXPERTS = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 4, "head_dim": 12},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 12,
                  "norm_topk_prob": True, "attention_bias": True},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.7},
}  # fmt: skip
"""The families whose MLPs are experts, which have a space of their own."""
SPACES = [(name, space) for name in FAMILIES for space in ("head_dim", "kv_group", "disp") if (name, space) != (
    "qwen3", "head_dim")]  # fmt: skip
"""Every family with every space that is exact in it."""


def build(name, dtype=torch.float32, scale=0.2, **overrides):
    """The model in evaluation mode, with biases that are not zero and norm weights that are not one."""
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
        mask[structure.start] = True
    return mask
