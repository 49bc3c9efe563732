"""The whole plan as one dictionary, which JSON can hold."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from atp.config import ATPConfig, ResolvedConfig
from atp.families import family_of
from atp.ground import progress
from atp.ground.environment import free_memory
from atp.ground.errors import InputError, shorten
from atp.inputs.checks import (
    BUDGET_TOLERANCE,
    base_remark,
    check_base_alone,
    check_reachable,
    check_sharded,
    few_scored,
    less_memory,
    recipe,
    rereads,
    sharding_remark,
    shortfalls,
)
from atp.inputs.folders import VOCABULARY
from atp.inputs.loading import RunData, check_prunable, load_shapes, weights_dtype
from atp.inputs.precision import autocast_dtype
from atp.inputs.resolve import resolve
from atp.inputs.targets import at_share, share_of, with_words
from atp.plan.cost import Flops, PhaseCost, cost_of
from atp.plan.data import data_of
from atp.plan.exchange import exchange_of
from atp.plan.exports import reachable_exports
from atp.plan.job import Questions, Workload
from atp.plan.latency import measured_target
from atp.plan.length import measured_length
from atp.plan.memory import memory_of
from atp.plan.page import duration, each, size
from atp.plan.parameters import parameters_of
from atp.plan.probe import flop_rates, is_quick, seconds_of
from atp.plan.shapes import ModelShapes
from atp.processes import processes
from atp.training.callbacks import check_trackers
from atp.training.resume import begun
from atp.vocabulary.vocabulary import sizes_of_words, words_remark, written

_DEVICES = ("cpu", "cuda")
_NOT_COUNTED = (
    "Generated answers, checkpoints and the timing of the models (three rounds or 20 seconds) are in no figure."
)
_BEFORE_WORDS = ("load", "score")  # parts of a run in which the model has all its words
_KEPT_BY_ALLOCATOR = 1.25  # of the largest part (docs/plan.md)
_LONG = 3600.0  # seconds from which the largest part is named
# What makes a part shorter.
_SHORTER = {
    "score": "lower evaluation.windows or evaluation.questions", "refit": "lower decisions.refit_windows",
    "score again": "lower evaluation.windows or evaluation.questions", "saliency": "lower decisions.saliency_windows",
    "dense baseline": "set evaluation.dense_baseline=false", "validation": "raise evaluation.every",
    "score dense": "set evaluation.dense_baseline=false",
}  # fmt: skip
_FEWER_STEPS = "lower training.steps or data.length, or set training.minutes to the time that you have"


def make_plan(
    config: ATPConfig, *, probe: bool | None = False, count: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """What `atp train` with this config will do and cost, without its weights; of several processes, what each will.

    probe: also times a few steps of some layers on this machine; None: one step of one layer, where that takes seconds
    and the data are known. count: of processes, default that of now. device: the
    type of the one that each trains on, `cpu` or `cuda`, default that of this machine. Sizes are in bytes, times in
    seconds. Raises `InputError` for settings that `atp train` would refuse before the first step; what is wrong with
    the data is said in the section `data` instead.
    """
    here, count = processes.device().type, count or processes.count()
    if device not in (None, *_DEVICES):
        raise InputError(f"--device '{shorten(device)}' is not planned for: use one of {', '.join(_DEVICES)}")
    device = device or here
    if probe and device != here:
        raise InputError(f"--probe times this machine, which trains on {here}: leave out --device {device}")
    asked, known = config, begun(config) if device == here else None
    check_trackers(asked.training.report_to)
    found, latency, length = load_shapes(asked.model), None, None
    check_prunable(asked.model, found, asked.decisions.space)
    check_sharded(asked, shared=count > 1 and asked.training.sharding is not None)
    progress.begin("reading the data")
    kept = written(Path(asked.output_dir) / VOCABULARY) if known is not None else None
    read = data_of(known or asked, found, count, kept) if asked.vocabulary.keep == "auto" else None  # sizes go by them
    words = _words(asked, found, read)
    config = known or asked
    if known is None:
        latency = measured_target(asked, shapes=words)
        config = at_share(asked, share_of(asked, words) if latency is None else latency["target_keep"])
    check_reachable(config, found)
    check_base_alone(config, count)
    data, samples = data_of(config, found, count, kept) if read is None else read
    progress.begin("counting")
    sample, scored = data.get("tokens_per_window", config.data.length), data.get("scored_share", 1.0)
    calibrated = data.get("tokens_per_calibration_window")
    if known is None:
        target = {"target_keep": config.decisions.target_keep}
        length = measured_length(asked, sample, scored, count, calibrated=calibrated, latency=target, shapes=words)
        steps, every = None if length is None else length["steps"], config.evaluation.every
        known = resolve(asked, latency=latency, steps=steps, device=device, shapes=words)
        if known.evaluation.every != every:  # so long a run has a validation split
            kept = None if samples is None or samples.vocabulary is None else samples.vocabulary.kept
            data, samples = data_of(known, found, count, kept)
    config, shapes = known, ModelShapes.of(words, known.decisions, device)
    if samples is not None:
        data["epochs"] = config.training.total / data["steps_per_epoch"]
        told = [*shortfalls(config, samples), *few_scored(asked, samples, count)]
        data["shortfalls"] = [*told, *rereads(config, data["steps_per_epoch"])]
    autocast = autocast_dtype(config.training.precision)
    questions = Questions(**data["questions"]) if "questions" in data else None
    vocabulary = _vocabulary(config, found, words, samples)
    job = Workload.of(
        _within(config, data), shapes, autocast=autocast, device=device, count=count, sample=sample,
        calibrated=calibrated, scored=scored, questions=questions,
    )  # fmt: skip
    memory, rows = memory_of(job), cost_of(job)
    if words is not found:  # the original is read and scored with all words
        whole = replace(job, shapes=ModelShapes.of(found, known.decisions, device), before=parameters_of(found))
        before = {str(row["phase"]): row for row in memory_of(whole) if row["phase"] in _BEFORE_WORDS}
        memory = [before.get(str(row["phase"]), row) for row in memory]
        rows = [cost_of(whole)[0], *rows[1:]]
    if probe is None and (device != here or "windows" not in data or not is_quick(job)):
        probe = False
    if probe is not False:
        progress.begin("timing a layer")
    speed = None if probe is False else flop_rates(job) if probe else flop_rates(job, 0.0, 1)
    free = free_memory(device) if device == here else None
    return {
        "model": {
            "path": config.model.path,
            "family": family_of(found).name,
            "layers": shapes.layers,
            "dtype": config.model.dtype,
            "products": _name(autocast or job.dtype),
            "device": device,
            "processes": count,
        },
        "decisions": {
            "space": config.decisions.space,
            "target_keep": config.decisions.target_keep,
            "source": config.decisions.source,
            "rounds": config.decisions.rounds,
            "latency": latency,
        },
        "parameters": {
            "before": _sized(parameters_of(found), job.dtype),
            "after": _sized(job.after, job.dtype),
            "decoder_share": shapes.share,
            "active": _active(job),
        },
        "widths": {
            name: {
                "kept": _one_or_all([count // layers[0].groups for count in shapes.counts[name]]),
                "of": _one_or_all([s.size // s.groups for s in layers]),
                "multiple": shapes.multiples.get(name, layers[0].unit),
            }
            for name, layers in shapes.space.by_name().items()
        },
        "vocabulary": vocabulary,
        "memory": memory,
        "free_memory": free,
        "cost": [
            {
                "phase": row.phase,
                "steps": row.steps,
                "tokens": row.tokens,
                "flops": row.flops.total,
                "seconds": None if speed is None else seconds_of(row, speed),
            }
            for row in rows
        ],
        "exchange": exchange_of(job),
        "quick_probe": probe is None,
        "flops_per_second": None if speed is None else {kind: rate for kind, rate in asdict(speed).items() if rate},
        "data": data,
        "exports": [reach._asdict() for reach in reachable_exports(config, found)],
        "remarks": [
            *([] if length is None else [f"{length['description']}."]),
            *_remarks(job, data),
            *_words_remarks(vocabulary),
            *_too_large(job, memory, free),
            *_too_long(rows, speed),
        ],
    }


def _words(
    asked: ATPConfig, found: PretrainedConfig, read: tuple[dict[str, Any], RunData | None] | None
) -> PretrainedConfig:
    """The model's config with the words that `vocabulary.keep` leaves; with all of them where nobody can know.

    read: the data, where their number goes by these.
    """
    data = None if read is None else read[1]
    if data is not None and data.vocabulary is not None:
        return data.vocabulary.shapes(found)
    return with_words(found, asked.vocabulary.keep)


def _vocabulary(
    config: ATPConfig, found: PretrainedConfig, words: PretrainedConfig, data: RunData | None
) -> dict[str, Any] | None:
    """What `vocabulary.keep` comes to: words, parameters, megabytes and tokens of a text; None without the key.

    found, words: the config of the model before and after. A figure that is not known is None.
    """
    keep, dtype = config.vocabulary.keep, weights_dtype(config.model, found)
    if keep is None:
        return None
    if data is not None and data.vocabulary is not None:
        return data.vocabulary.facts(found, dtype, data.splits.test)
    return sizes_of_words(found, dtype, words.vocab_size if keep != "auto" else None)


def _within(config: ResolvedConfig, data: dict[str, Any]) -> ResolvedConfig:
    """The config without windows that the data do not have: the run takes what there is."""
    if "windows" not in data:
        return config
    evaluation, decisions, windows = config.evaluation, config.decisions, data["windows"]
    scored = {"windows": min(evaluation.windows, windows["test"])}
    judged = {
        name: min(getattr(decisions, name), windows["calibration"]) for name in ("refit_windows", "saliency_windows")
    }
    if "validation" in windows:
        scored["validation_windows"] = min(config.evaluation.validation_windows or 0, windows["validation"])
    return config.model_copy(
        update={
            "evaluation": evaluation.model_copy(update=scored),
            "decisions": decisions.model_copy(update=judged),
        }
    )


def _sized(parameters: dict[str, int], dtype: torch.dtype) -> dict[str, dict[str, int]]:
    return {part: {"parameters": n, "bytes": n * dtype.itemsize} for part, n in parameters.items()}


def _active(job: Workload) -> dict[str, int] | None:
    """The parameters that a token meets, before and after the cut; None in a model without experts, where it is all."""
    idle = (
        sum(widths.stacked + widths.weights - widths.active for widths in layers)
        for layers in (job.shapes.whole, job.shapes.kept)
    )
    if job.shapes.whole[0].experts is None:
        return None
    totals = (job.before["total"], job.after["total"])
    return {name: total - rest for name, total, rest in zip(("before", "after"), totals, idle, strict=True)}


def _one_or_all(counts: list[int]) -> int | list[int]:
    """The number that all layers have, or that of each layer where they differ."""
    return counts[0] if len(set(counts)) == 1 else counts


def _remarks(job: Workload, data: dict[str, Any]) -> list[str]:
    """What a reader must know of the figures."""
    config, shapes = job.config, job.shapes
    remarks = [
        f"Widths are those of a cut that is the same in all layers{_of_unequal(shapes)}. A run chooses them layer by "
        f"layer and keeps the target, to within {BUDGET_TOLERANCE:.1%} of the decoder."
    ]
    if config.decisions.blocks:
        left_out = any(s.size and not shapes.counts[s.name][s.layer] for s in shapes.space.structures)
        remarks.append(
            "Which whole blocks go is not known before a run: the plan "
            + ("leaves out the last layers, as many as the target needs." if left_out else "leaves out none.")
        )
    if abs(shapes.share - config.decisions.target_keep) > BUDGET_TOLERANCE:
        remarks.append(
            f"Equal widths keep {shapes.share:.1%} of the decoder, the nearest to {config.decisions.target_keep:.1%}."
        )
    if "scored_share" not in data:
        remarks.append("Without data every token counts as one with a loss.")
    if config.evaluation.dense_baseline:
        remarks.append("The memory of the dense baseline is not estimated.")
    more = [*recipe(config), *base_remark(config), *sharding_remark(config, job.count), *_offload_remark(job)]
    return [*remarks, *(line[0].upper() + line[1:] + "." for line in more), _NOT_COUNTED]


def _words_remarks(vocabulary: dict[str, Any] | None) -> list[str]:
    """A sentence on the words that stay; none where all do."""
    if vocabulary is None:
        return []
    if vocabulary["words"]["after"] is None:
        return ["vocabulary.keep=auto goes by the data, without which the figures are those of all words."]
    line = words_remark(vocabulary)
    return [line[0].upper() + line[1:] + "."]


def _too_large(job: Workload, memory: list[dict[str, Any]], free: int | None) -> list[str]:
    """What to change where the largest part does not fit into the memory of this machine."""
    largest = max(memory, key=lambda row: row["bytes"])
    needed = _KEPT_BY_ALLOCATOR * largest["bytes"] * (1 if job.device == "cuda" else job.count)
    if free is None or needed <= free:
        return []
    every = f" in {job.count} processes" if job.device != "cuda" and job.count > 1 else ""
    return [
        f"Part {largest['phase']} takes about {size(needed)}{every}, a quarter of it for what an allocator keeps, and "
        f"{size(free)} are free here: {less_memory(job.config)}."
    ]


def _too_long(rows: list[PhaseCost], speed: Flops | None) -> list[str]:
    """What to change where a run takes hours."""
    seconds = {} if speed is None else {row.phase: seconds_of(row, speed) for row in rows}
    total = sum(seconds.values())
    if total < _LONG:
        return []
    longest = max(seconds, key=seconds.__getitem__)
    return [
        f"Of {duration(total)}, part {longest} takes {seconds[longest] / total:.0%}: "
        f"{_SHORTER.get(longest, _FEWER_STEPS)}."
    ]


def _offload_remark(job: Workload) -> list[str]:
    """How much `training.offload` keeps elsewhere: the activations of the largest pass without it."""
    config = job.config
    if not config.training.offload:
        return []
    stays = config.model_copy(update={"training": config.training.model_copy(update={"offload": False})})
    rows: list[Any] = [row["parts"] for row in memory_of(replace(job, config=stays))]
    most = max(parts["activations"] + parts.get("merged", 0) for parts in rows if "activations" in parts)
    where = "in the host's memory" if job.device == "cuda" else f"in a file in {config.output_dir}"
    return [f"up to {size(most)} of activations lie {where} in a pass{each(job.count)}"]


def _of_unequal(shapes: ModelShapes) -> str:
    return "" if shapes.space.equal_layers else ", as a share of what the layer has now"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
