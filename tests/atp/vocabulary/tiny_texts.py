"""A tiny model with a byte-level or sentencepiece tokenizer, and texts that use a part of its words."""

import json

import torch
from tiny_tokenizers import MARKED, byte_level, sentencepiece
from transformers import AutoModelForCausalLM, LlamaConfig

from atp.config import ATPConfig

KINDS = {
    "byte-level": lambda: byte_level("llama-bpe", vocab_size=400, bos=True, template=MARKED),
    "sentencepiece": lambda: sentencepiece(template=MARKED),
}
PADDING = 5  # rows of the embedding beyond the tokenizer's
DOMAIN = "The quick brown fox sleeps; it doesn't jump over lazy dogs in 2024, we'll have spaces".split()


def tiny_texts(folder, kind="byte-level", **sizes):
    """Writes model, tokenizer and texts to a folder; returns a config on them. sizes: of the model."""
    tokenizer = KINDS[kind]()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    values = {
        "vocab_size": len(tokenizer) + PADDING, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 96, "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "head_dim": 8,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**values | sizes))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.unk_token_id]
    model.save_pretrained(folder)
    rows = [{"text": " ".join((DOMAIN * 3)[i % 13 :][: 14 + i % 5]) + f" {i}."} for i in range(60)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ATPConfig.parse(
        {
            "model": {"path": str(folder)},
            "output_dir": "unused",
            "data": {"train": str(folder / "data.jsonl"), "length": 32, "general_share": 0},
            "vocabulary": {"keep": "auto"},
            "decisions": {"space": "kv_group", "target_keep": 0.6, "uniform": True, "multiples": {"mlp": 4},
                          "refit_windows": 4},
            "training": {"steps": 6, "batch_size": 2, "save_every": 1, "lr": 5e-3, "precision": "float32"},
            "evaluation": {"windows": 6, "samples": 1},
        }
    )  # fmt: skip
