"""Cases of model folders: config.json with layers of their own widths, weights, their index, tokenizer, GGUF files."""

import functools
import json
import tempfile
from pathlib import Path

import torch
from fuzz_draws import ODD_JSON, as_json, garbled, scrambled
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atp.config import ModelConfig
from atp.export.gguf import architecture_of, write_gguf
from atp.ground.errors import InputError
from atp.inputs.loading import check_prunable, check_vocabulary, load_any_model, load_model, load_shapes, load_tokenizer
from atp.models.config import CutConfig
from atp.processes.finite import refuse_weights
from atp.removal.cut import cut_model
from atp.spaces.space import MaskSpace

WEIGHTS, INDEX, GGUF = "model.safetensors", "model.safetensors.index.json", "model.gguf"


@functools.cache
def folders():
    """Name -> folder of a whole Llama, of one in parts, and of one cut to unequal layers, each with a tokenizer."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-models-"))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["</s>"], "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=264, **options)
    core.train_from_iterator(["some text to learn pairs of letters from"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=0, bos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    whole = LlamaForCausalLM(config)
    space = MaskSpace.from_config(config, "kv_group")
    mask = torch.ones(space.size, dtype=torch.bool)
    for structure in space.structures:
        mask[structure.start : structure.start + structure.size // (2 + structure.layer)] = False
    cut = cut_model(LlamaForCausalLM(config), space, mask)
    for name, model in (("whole", whole), ("cut", cut)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    shapes = CutConfig.from_whole(config)
    write_gguf(whole, shapes, tokenizer, architecture_of(shapes, "it"), "f32", root / "whole" / GGUF, {"name": "Tiny"})
    whole.save_pretrained(root / "two", max_shard_size="20KB")
    tokenizer.save_pretrained(root / "two")
    return {path.name: path for path in root.iterdir()}


def use_model(folder, **where):
    """What a command does with a model; a cut one is loaded for its scores, a whole one for a run too."""
    config = ModelConfig(path=str(folder), dtype="float32", **where)
    shapes = load_shapes(config)
    check_vocabulary(config, load_tokenizer(config))
    try:
        check_prunable(config, shapes, "kv_group")
    except InputError:
        refuse_weights(model := load_any_model(config))
    else:
        model = load_model(config, "kv_group")
    ids = torch.arange(4)[None] % model.config.vocab_size
    if not torch.isfinite(model(ids).logits.sum()):
        raise InputError("its logits are not finite")  # as the score of the original model is refused


def _copied(draw, folder, names):
    source = folders()[draw.choice(names)]
    copy = folder / "model"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).symlink_to(path)
    return source, copy


def _replace(path, content):
    path.unlink()
    path.write_bytes(content)


def model_config_case(draw, folder):
    source, copy = _copied(draw, folder, ("whole", "cut", "cut"))
    _replace(copy / "config.json", as_json(draw, json.loads((source / "config.json").read_bytes()), 4))
    use_model(copy)


def index_case(draw, folder):
    source, copy = _copied(draw, folder, ("two",))
    _replace(copy / INDEX, as_json(draw, json.loads((source / INDEX).read_bytes()), 4))
    use_model(copy)


def tokenizer_case(draw, folder):
    source, copy = _copied(draw, folder, ("whole",))
    name = draw.choice(("tokenizer.json", "tokenizer_config.json"))
    _replace(copy / name, as_json(draw, json.loads((source / name).read_bytes()), 4))
    load_tokenizer(ModelConfig(path=str(copy)))


def safetensors_case(draw, folder):
    """A file of weights: its header as text, or its bytes."""
    source, copy = _copied(draw, folder, ("whole", "cut"))
    content = (source / WEIGHTS).read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    if draw.random() < 0.5:
        text = scrambled(draw, content[8:size].decode(), ODD_JSON, draw.randrange(1, 3)).encode("utf-8", "replace")
        told = len(text) if draw.random() < 0.8 else draw.choice((0, 1, 2**31, 2**63, 2**64 - 1))
        content = told.to_bytes(8, "little") + text + content[size:]
    else:
        place = draw.choice((0, 8, size))
        rest = content[place + 400 :] if draw.random() < 0.8 else b""
        content = content[:place] + garbled(draw, content[place : place + 400], draw.randrange(1, 5)) + rest
    _replace(copy / WEIGHTS, content)
    use_model(copy)


def gguf_case(draw, folder):
    source, copy = _copied(draw, folder, ("whole",))
    content = (source / GGUF).read_bytes()
    place = draw.choice((0, 0, 24, draw.randrange(len(content))))
    length = draw.choice((24, 200, 4000))
    changed = garbled(draw, content[place : place + length], draw.choice((1, 1, 2, 5)))
    _replace(copy / GGUF, content[:place] + changed + content[place + length :])
    use_model(copy, gguf_file=GGUF)
