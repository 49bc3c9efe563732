"""A tiny random Llama in float64 with norms that are not one, calibration windows, and a config to go with them."""

import torch
from zeroed import VOCAB, stock_model

from atp.config import ATPConfig
from atp.data import PackedDataset


def model(layers=2, dtype=torch.float64, **overrides):
    return stock_model(dtype=dtype, num_hidden_layers=layers, **overrides)


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
