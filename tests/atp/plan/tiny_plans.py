"""A tiny model that trains, with the job that a plan makes of it."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from atp.config import ATPConfig
from atp.inputs.resolve import resolve
from atp.lora.layer import add_lora
from atp.models.attention import use_training_attention
from atp.plan.job import Workload
from atp.plan.shapes import ModelShapes, mask_of
from atp.removal import cut_config
from atp.spaces.space import MaskSpace

VOCAB, RANK, LENGTH = 64, 4, 32
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {"head_dim": 16},
    "mistral": {"num_key_value_heads": 6, "head_dim": 8, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"num_key_value_heads": 3, "residual_multiplier": 0.22},
}


def tiny(family="llama", **changes):
    """The transformers config of a tiny model."""
    return AutoConfig.for_model(family, **SIZES | FAMILIES[family] | changes)


def settings(*overrides):
    """A run's config on windows of 32 tokens, two a step."""
    return ATPConfig.parse(
        {
            "model": {"path": "tiny"},
            "output_dir": "unused",
            "data": {"length": LENGTH},
            "decisions": {"multiples": {}, "source": "tuned"},
            "lora": {"r": RANK, "alpha": 8},
            "training": {"batch_size": 2, "precision": "float32"},
        },
        list(overrides),
    )


def job(*overrides, family="llama", autocast=None, device="cpu", scored=1.0, count=None, sample=None, **changes):
    """The job of a plan for a tiny model."""
    config = resolve(settings(*overrides))
    shapes = ModelShapes.of(tiny(family, **changes), config.decisions)
    return Workload.of(config, shapes, autocast=autocast, device=device, scored=scored, count=count, sample=sample)


def unequal_job(*overrides, scored=1.0):
    """The job of a plan for a model that is cut already, to 2 and 1 KV groups and 256 and 100 channels."""
    config, whole = resolve(settings(*overrides)), tiny()
    space = MaskSpace.from_config(whole, "kv_group")
    mask = mask_of(space, {"kv_group": [2, 1], "mlp": [256, 100]})
    shapes = ModelShapes.of(cut_config(whole, space, mask), config.decisions)
    return Workload.of(config, shapes, autocast=None, device="cpu", scored=scored)


def lora_model(shapes, dropout=0.0):
    """A model of these shapes that trains as a run's does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shapes.config)
    lora = add_lora(model, shapes.space, r=RANK, alpha=8, dropout=dropout)
    use_training_attention(lora.get_base_model())
    return lora.train()
