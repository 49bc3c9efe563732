"""A run on a model so small that ten steps take a second."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from atp.config import ATPConfig
from atp.data import PackedDataset, RaggedDataset
from atp.models.base import quantize_base
from atp.spaces.space import MaskSpace
from atp.training import checkpoint as checkpoints
from atp.training.trainer import ATPTrainer

SEARCH, SETTLE, TUNE = 4, 2, 4
CUT, TOTAL = SEARCH + SETTLE, SEARCH + SETTLE + TUNE
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 48, "tie_word_embeddings": True,
}  # fmt: skip


def windows(count, seed):
    ids = torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(seed))
    return PackedDataset(ids, ids.clone())


def separate(count, seed):
    """Windows of three documents each, kept apart."""
    joined = windows(count, seed)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 10)]).expand(count, -1)
    return PackedDataset(joined.input_ids, joined.labels.masked_fill(positions == 0, -100), positions)


def ragged(count, seed):
    """Documents of 4 to 16 tokens, the loss on their last three."""
    documents = []
    for row, ids in enumerate(windows(count, seed).input_ids.tolist()):
        kept = ids[: 4 + row * 5 % 13]
        documents.append((kept, [-100] * (len(kept) - 3) + kept[-3:]))
    return RaggedDataset(documents)


def make(folder, model_seed=0, callbacks=(), sizes=None, dtype=torch.float32, validation=None, **overrides):
    torch.manual_seed(model_seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | (sizes or {}))).to(dtype)
    config = {
        "model": {"path": "tiny"},
        "output_dir": str(folder),
        "seed": 3,
        "decisions": {"space": "head_dim", "source": "learned", "refit_windows": 32},
        "lora": {"r": 8, "alpha": 8, "dropout": 0.1},
        "training": {"search": SEARCH, "settle": SETTLE, "tune": TUNE, "batch_size": 2, "save_every": 1,
                     "keep_checkpoints": 20, "precision": "float32", "warmup": 2, "lr": 1e-2, "beta2": 0.999},
    }  # fmt: skip
    for key, value in overrides.items():
        config[key] = config.get(key, {}) | value
    load_in = config["model"].get("load_in")
    if load_in is not None:
        quantize_base(model, load_in, MaskSpace.from_config(model.config, config["decisions"]["space"]))
    folder.mkdir(parents=True, exist_ok=True)
    packing = config.get("data", {}).get("packing", "joined")
    make_data = {"joined": windows, "separate": separate, "padded": ragged}[packing]
    settings, train, calibration = ATPConfig.parse(config), make_data(20, 1), make_data(6, 2)
    return ATPTrainer(settings, model, train, calibration, validation=validation, callbacks=callbacks)


def trained_tensors(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def place(folder, step, target):
    """Puts a checkpoint of a finished run into the folder of another run, as its newest."""
    loaded = checkpoints.load(folder / "checkpoints" / f"checkpoint-{step:08d}")
    loaded.meta["config"]["output_dir"] = str(target)
    checkpoints.save(target / "checkpoints", loaded, keep=1)


def resumed(folder, step, target, **options):
    """The trainer of a run that goes on to its end from a checkpoint of another run."""
    place(folder, step, target)
    trainer = make(target, **options)
    torch.manual_seed(999)  # what the process did before must not matter
    trainer.train(resume=True)
    return trainer


def assert_same_end(found, expected):
    """Bit for bit: decisions, all that was trained, and how many tokens were read."""
    assert torch.equal(found.decisions.mask, expected.decisions.mask)
    tensors, others = trained_tensors(found), trained_tensors(expected)
    assert tensors.keys() == others.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []
    assert expected.clock.tokens.items() <= found.clock.tokens.items()
