"""Named sets of settings, on top of which a config is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from atp.config import ATPConfig

AUTO: Final = "auto"
_BY_STEPS = ((3000, "thorough"), (1000, "standard"), (400, "quick"))
"""From how many steps on `auto` stands for a preset; below, for the defaults alone."""
PRESETS: dict[str, dict[str, Any]] = {
    # What each gives: docs/results.md#presets. So large a refit would take much of the time of fewer than 400 steps.
    "quick": {"decisions": {"refit_windows": 192}},
    # A long run may read small data so often that it learns them by heart: its best adapter is kept, not its last.
    "standard": {"training": {"steps": 1200, "keep_best": True}, "evaluation": {"every": 100},
                 "decisions": {"refit_windows": 192}},
    "thorough": {"training": {"steps": 3600, "lr": 7e-4, "keep_best": True}, "evaluation": {"every": 200},
                 "decisions": {"refit_windows": 192}},
    # 128 suits tensor cores and every quantised format with blocks of up to 128.
    "stock": {"decisions": {"space": "kv_group", "uniform": True, "multiples": {"mlp": 128}, "refit_windows": 96}},
    # The recorded paper runs (docs/method.md section 10): batch 20, 750 search steps, 1e-4 and 1e-3, penalty budget.
    "paper": {
        "decisions": {"space": "head_dim", "source": "learned", "generator": "transformer", "init": "paper",
                      "budget": "penalty", "lr": 1e-3, "batch_size": 20, "every": 1, "refit_windows": 0,
                      "multiples": {}},
        "lora": {"r": 8, "alpha": 8, "dropout": 0.1},
        "training": {"open": 0, "beta2": 0.999, "search": 750, "settle": 50, "tune": 700,
                     "batch_size": 20, "lr": 1e-4, "schedule": "constant", "warmup": 0, "update_clipping": False},
    },
}  # fmt: skip


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The nested settings of `base`, with those of `over` in their place."""
    result = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def without_steps(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The settings without a preset's number of steps where the user's own give minutes or tokens in their place."""
    training, given = settings.get("training"), own.get("training")
    if not isinstance(training, dict) or not isinstance(given, dict) or "steps" in given:
        return settings
    if given.get("minutes") is None and given.get("tokens") is None:
        return settings
    return settings | {"training": {key: value for key, value in training.items() if key != "steps"}}


def auto_in_words() -> str:
    """What `preset: auto` stands for."""
    return "the defaults; " + "; ".join(f"from {least} steps on {name}" for least, name in reversed(_BY_STEPS))


def lengths_below(steps: int) -> list[int]:
    """`steps`, and below them the most steps for which `auto` stands for each shorter preset; the longest first."""
    return [steps, *(least - 1 for least, _ in _BY_STEPS if least <= steps)]


def by_length(config: ATPConfig) -> ATPConfig:
    """The config with what `preset: auto` stands for at its number of steps, below settings that were given.

    As it is under another preset, and where the length is not known yet or the phases are given one by one.
    """
    training, evaluation = config.training, config.evaluation
    if config.preset != AUTO or training.budget or training.tune is not None:
        return config
    name = next((name for least, name in _BY_STEPS if training.steps >= least), "")
    sections = {}
    for section, settings in PRESETS.get(name, {}).items():
        own = getattr(config, section)
        kept = own.model_fields_set | {"steps"}
        if evaluation.every is None and "every" in evaluation.model_fields_set:
            kept |= {"keep_best"}  # nobody watches
        sections[section] = own.model_copy(update={key: value for key, value in settings.items() if key not in kept})
    return config.model_copy(update=sections)
