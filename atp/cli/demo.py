"""The main job on an embedded model and embedded data, sized for two CPU cores and a quarter of an hour."""

from __future__ import annotations

import json
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

from atp.config import ATPConfig
from atp.ground.places import PACKAGED_MODEL

RECORDED_DENSE = Path(__file__).with_name("demo_dense.json")
# What the scores of the tuned dense model depend on.
DENSE_SETTINGS = (
    "model.path", "seed", "data.recipe", "data.length", "data.packing", "data.loss_on", "lora.r", "lora.alpha",
    "lora.dropout", "lora.variant", "training.total", "training.batch_size", "training.gradient_accumulation",
    "training.lr", "training.second_moment", "training.schedule", "training.warmup", "training.clip",
    "training.update_clipping", "evaluation.windows", "evaluation.questions",
)  # fmt: skip


def demo_config(output_dir: Path, overrides: list[str] | None = None) -> ATPConfig:
    """Settings of the demo, with `key.path=value` overrides."""
    return ATPConfig.parse(
        {
            "model": {"path": PACKAGED_MODEL},
            "output_dir": str(output_dir),
            # The answer to a headline is one word: small steps, and many of them, as `atp init` writes for labels.
            "data": {"recipe": "satire-mini", "length": 192, "packing": "padded", "loss_on": "completion"},
            "training": {"steps": 600, "batch_size": 4},
            "evaluation": {"dense_baseline": True, "windows": 40, "questions": 600},
        },
        ["evaluation.answers=true", *(overrides or [])],
    )


def recorded_dense(config: ATPConfig, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """What the tuned dense model scored in an earlier demo, for a run that tunes none.

    Returns {command, perplexity, perplexity_interval, tasks: {task: {metric, metric_interval}}}; None, after saying
    why, if the config has other settings than that demo, since its figures are no comparison then.
    """
    record = json.loads(RECORDED_DENSE.read_text(encoding="utf-8"))
    recorded = record.pop("settings")
    other = [key for key, value in dense_settings(config).items() if value != recorded.get(key)]
    if not other:
        return record
    say(f"the recorded figures of the tuned dense model are left out: they are for another {', '.join(other)}")
    return None


def dense_settings(config: ATPConfig) -> dict[str, Any]:
    """{key.path: value} of everything that the tuned dense model's scores depend on."""
    return {key: attrgetter(key)(config) for key in DENSE_SETTINGS}
