"""The main job on an embedded model and embedded data, sized for two CPU cores and a quarter of an hour."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from transformers import GenerationMixin

from atp.config import ATPConfig
from atp.data.packages import PACKAGED_MODEL
from atp.models.load import read_model, read_tokenizer

_QUESTION = (
    "Abstract: We followed 412 adults with mild hypertension for two years. Those who walked 30 minutes a day had a "
    "lower blood pressure at the end than those who did not (p < 0.01).\n"
    "Question: Does daily walking lower blood pressure in mild hypertension?\nAnswer:"
)


def demo_config(output_dir: Path, overrides: list[str] | None = None) -> ATPConfig:
    """Settings of the demo, with `key.path=value` overrides."""
    return ATPConfig.parse(
        {
            "model": {"path": PACKAGED_MODEL},
            "output_dir": str(output_dir),
            # One word of an abstract is its answer: the text around it is most of what there is to learn.
            "data": {"recipe": "health-mini", "length": 192, "loss_on": "all"},
            # In so short a run whole KV groups measured better than single dimensions (docs/method.md section 10).
            "decisions": {
                "space": "kv_group",
                "saliency_windows": 24,
                "refit_windows": 96,
                "every": 2,
            },
            # Dropout costs a fifth of a step on a CPU.
            "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
            # At equal tokens more and smaller steps measured better (docs/measured.md).
            "training": {"batch_size": 2, "search": 48, "settle": 12, "tune": 140, "lr": 2e-3},
            "evaluation": {"dense_baseline": True, "windows": 40, "questions": 50},
        },
        overrides,
    )


def ask(folder: Path) -> tuple[str, str]:
    """A question and what the cut model in `folder` answers."""
    tokenizer = read_tokenizer(folder)
    model = read_model(folder, dtype=torch.float32)
    inputs = tokenizer(_QUESTION, return_tensors="pt")
    output = cast(GenerationMixin, model).generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return _QUESTION, answer.strip().splitlines()[0] if answer.strip() else "(nothing)"
