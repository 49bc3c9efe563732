"""A tiny random Llama in float64 with norms that are not one, calibration windows, and a config to go with them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from atp.config import ATPConfig
from atp.data import PackedDataset

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 4, 2, 8, 32, 40, 61


def model(layers=2, dtype=torch.float64, **overrides):
    torch.manual_seed(0)
    values = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(**values | overrides))
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return llama.to(dtype).eval()


def windows(count=6, length=16, seed=1):
    ids = torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return PackedDataset(ids, ids.clone())


def config(folder="unused", **overrides):
    values = {
        "model": {"path": "tiny"},
        "output_dir": str(folder),
        "decisions": {"space": "kv_group", "saliency_windows": 4},
        "training": {"search": 3, "settle": 1, "tune": 4, "batch_size": 2, "precision": "float32", "warmup": 1},
    }
    for key, value in overrides.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return ATPConfig.parse(values)
