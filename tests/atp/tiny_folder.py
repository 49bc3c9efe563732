"""A folder with a tiny Llama and its tokenizer, and ways to spoil it."""

import json
import random

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the cat sat on a mat and it was not there again".split()


def save(folder, *, words=WORDS, seed=0, shards=False, **changes):
    """Saves model and tokenizer under `folder` and returns it."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes))
    model.save_pretrained(folder, **({"max_shard_size": "4KB"} if shards else {}))
    vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def write_texts(path):
    draw = random.Random(0)
    rows = [json.dumps({"text": " ".join(draw.choices(WORDS, k=50))}) for _ in range(40)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def edit_json(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def edit_weights(folder, change):
    """Lets `change` alter the dictionary of all tensors in model.safetensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def moved_weights(folder):
    """Another number in one place."""
    edit_weights(folder, lambda tensors: next(iter(tensors.values())).view(-1)[3].add_(1e-3))


def edited(name, old, new):
    """What puts a text in the place of another, once, in a file of a folder."""

    def change(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change
