"""What to change in a config when memory runs out."""

from __future__ import annotations

from atp.config import ATPConfig

_SHORTEST = 16  # the least that data.length may be


def less_memory(config: ATPConfig) -> str:
    """The three cheapest changes that make a run take less memory, as overrides: the same result first, then nearly."""
    training, decisions, data = config.training, config.decisions, config.data
    changes = []
    if training.batch_size > 1:
        kept = training.batch_size * training.gradient_accumulation
        half = next(size for size in range(training.batch_size // 2, 0, -1) if kept % size == 0)
        changes.append(f"training.batch_size={half} training.gradient_accumulation={kept // half}")
    if not training.gradient_checkpointing:
        changes.append("training.gradient_checkpointing=true")
    if config.evaluation.batch_size > 1:
        changes.append(f"evaluation.batch_size={config.evaluation.batch_size // 2}")
    if decisions.batch_size > 1:
        changes.append(f"decisions.batch_size={decisions.batch_size // 2}")
    if data.length > _SHORTEST:
        changes.append(f"data.length={max(data.length // 2, _SHORTEST)}")
    if not changes:
        return "take a smaller model or a machine with more memory"
    return f"start a new run with {', with '.join(changes[:3])}"
