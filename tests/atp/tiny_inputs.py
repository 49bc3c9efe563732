"""A tiny model with questions that whole runs, comparisons and experiments train on."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atp.config import ATPConfig

WORDS = "the heart rate of patients fell after treatment in both groups yes no".split()


def tiny_config(folder, **sizes):
    """Writes model and data to a folder, the answers of the questions being in the text; returns a config on them.

    sizes: of the model, where they differ from the usual ones.
    """
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS, *map(str, range(60))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # The model knows no padding token: its config is aligned with the tokenizer's.
    tokens = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    values = {
        "vocab_size": len(vocabulary), "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 96, "eos_token_id": 1, "bos_token_id": 1,
        "tie_word_embeddings": True,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**values | sizes)).save_pretrained(folder)
    answers = ["no", "yes"] * 30
    text = " ".join(WORDS[:11])
    rows = [{"prompt": f"{i} {text} {answer}", "completion": f" {answer}"} for i, answer in enumerate(answers)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ATPConfig.parse(
        {
            "model": {"path": str(folder)},
            "output_dir": "unused",
            "data": {"train": str(folder / "data.jsonl"), "labels": ["yes", "no"], "length": 16, "general_share": 0},
            "decisions": {"space": "kv_group", "saliency_windows": 2, "target_keep": 0.6},
            "training": {"search": 2, "settle": 1, "tune": 3, "batch_size": 2, "save_every": 1, "warmup": 1,
                         "lr": 5e-3, "precision": "float32"},
            "evaluation": {"windows": 20, "questions": 10, "dense_baseline": True},
        }
    )  # fmt: skip


def changed(config, *overrides):
    return ATPConfig.parse(config.model_dump(mode="json"), list(overrides))
