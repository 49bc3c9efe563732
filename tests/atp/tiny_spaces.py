"""Tiny configs, logits and an independent count of the parameters that a decision list leaves."""

import torch
from transformers import LlamaConfig, MistralConfig

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 12, 10, 4, 2, 4, 2


def config(family="llama", **overrides):
    values = {
        "vocab_size": 17, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
    } | overrides  # fmt: skip
    return {"llama": LlamaConfig, "mistral": MistralConfig}[family](**values)


def larger(**overrides):
    """Big enough that one block is well under 0.1 % of the decoder."""
    values = {"hidden_size": 96, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
              "num_key_value_heads": 3, "head_dim": 16}  # fmt: skip
    return config(**values | overrides)


def random_logits(budget, seed=0, scale=1.0):
    return scale * torch.randn(budget.space.size, generator=torch.Generator().manual_seed(seed))


def decoder_params(layers, *, attention_bias=False, mlp_bias=False):
    """Decoder parameters by the textbook formula; layers: kept counts, one dict a layer, as the tiny config's."""
    total = 0
    for kept in layers:
        queries, groups = HEADS, KV_HEADS
        if "kv_group" in kept:
            queries, groups = kept["kv_group"] * HEADS // KV_HEADS, kept["kv_group"]
        qk, vo, inner = 2 * kept.get("qk", HEAD_DIM // 2), kept.get("vo", HEAD_DIM), kept["mlp"]
        outputs = [queries * qk, groups * qk, groups * vo]
        read, written = kept.get("attention_inputs", HIDDEN), kept.get("attention_outputs", HIDDEN)
        total += sum(outputs) * read + queries * vo * written + attention_bias * (sum(outputs) + written)
        read, written = kept.get("mlp_inputs", HIDDEN), kept.get("mlp_outputs", HIDDEN)
        total += inner * (2 * read + written) + mlp_bias * (2 * inner + written) + 2 * HIDDEN
    return total
