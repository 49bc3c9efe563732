"""A tiny Llama, with stock LoRA or with masked LoRA of the same weights."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from atp.lora.layer import add_lora
from atp.spaces.space import MaskSpace

TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
RANK, ALPHA = 3, 6.0


def base_model(dtype=torch.float32, **overrides):
    values = {
        "vocab_size": 29, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.3, "attention_bias": True,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**values | overrides)).to(dtype)


def fill(model, seed=1):
    """LoRA starts at B = 0: give both factors weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def masked(dropout=0.0, space_name="head_dim", variant="lora", **overrides):
    base = base_model(**overrides)
    space = MaskSpace.from_config(base.config, space_name)
    return fill(add_lora(base, space, r=RANK, alpha=ALPHA, dropout=dropout, variant=variant)), space


def stock(dropout=0.0, flags=None, **overrides):
    """flags: of PEFT's LoraConfig, such as use_dora."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM", **flags or {}
    )  # fmt: skip
    return fill(get_peft_model(base_model(**overrides), config))


def tokens(windows=2, length=9):
    return torch.randint(0, 29, (windows, length), generator=torch.Generator().manual_seed(2))


def random_mask(space, seed=3, keep=0.6):
    mask = torch.rand(space.size, generator=torch.Generator().manual_seed(seed)) < keep
    for structure in space.structures:
        mask[structure.start] = True
    return mask
