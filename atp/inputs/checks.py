"""Checks before the first step: refuse what cannot work, report what falls short."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from atp.config import ATPConfig, ResolvedConfig
from atp.config.presets import PRESETS
from atp.config.training import ENOUGH_SCORED
from atp.data import scored_per_sample
from atp.data.examples import values
from atp.decide.budget import Budget
from atp.decide.reach import nearest_share
from atp.decide.rules import width_rules
from atp.decide.uniform import equal_counts, half_block, require_equal_layers, share_of
from atp.families import ExpertFamily, family_of
from atp.ground.errors import InputError, quote, shorten
from atp.inputs.loading import RunData, check_length
from atp.processes import processes
from atp.spaces.space import MaskSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # seconds, which these checks do not take

BUDGET_TOLERANCE = 0.002  # largest gap between the target and the share kept, of the decoder
_OFTEN = 2  # epochs; dev/LOG.md has what 1.2 and 2.8 of them give
_FEW, _RATE = 16, 1e-3  # tokens with a loss in a step, and a rate that fewer bear (dev/LOG.md)
_SCORES = 20  # of the validation split in a run, where one is advised
_SHORTEST = 16  # tokens, the least that data.length may be


def check_reachable(config: ATPConfig, shapes: PretrainedConfig, tolerance: float = BUDGET_TOLERANCE) -> None:
    """Raises `InputError` for what no run can do.

    Windows beyond the model's positions, decisions without the steps that make them, a target that no mask can meet,
    `model.load_in` beside what needs floating weights.
    """
    check_base_alone(config)
    check_sharded(config)
    check_experts(config, shapes)
    check_length(shapes, config.data.length)
    check_phases(config)
    target = config.decisions.target_keep
    nearest, rules = nearest_kept(config, shapes), _rules(config, shapes)[1]
    if not abs(nearest - target) <= max(tolerance, rounding(config, shapes)):
        coarse = {name: multiple for name, multiple in rules.items() if multiple > 1}
        why = f" with decisions.multiples {quote(coarse)}" if coarse else ""
        remedy = "choose that, or lower the multiples" if why else "choose that"
        raise InputError(
            f"decisions.target_keep is {target}, but the nearest share that whole structures of this model can keep"
            f"{why} is {nearest:.4f}: {remedy}"
        )


def check_experts(config: ATPConfig, shapes: PretrainedConfig) -> None:
    """Raises `InputError` for a target that leaves fewer experts than a token takes, and for experts in shards."""
    if processes.sharded() and isinstance(family_of(shapes), ExpertFamily):
        raise InputError(
            "training.sharding=fsdp reads weights by their names, which experts have not in their files: leave it out"
        )
    if config.lora.experts and not isinstance(family_of(shapes), ExpertFamily):
        raise InputError(f"lora.experts is true, and family '{family_of(shapes).name}' has no experts: leave it out")
    budget, rules = _rules(config, shapes)
    for structure in budget.space.layer(0):
        if (multiple := rules.get(structure.name, structure.unit)) % structure.unit:
            raise InputError(
                f"decisions.multiples has {multiple} for {structure.name}, and products of experts take widths that "
                f"are multiples of {structure.unit}: choose one, or leave it out"
            )
    fewest = [-(-s.least // s.step(rules)) * s.step(rules) for s in budget.space.structures]
    counts = torch.tensor(fewest, dtype=torch.float64)
    least, target = float(budget.parameters(counts)) / budget.total, config.decisions.target_keep
    needy = next((structure for structure in budget.space.structures if structure.least > 1), None)
    if needy is not None and target < least - rounding(config, shapes):
        takes = (
            f"each of {needy.groups} experts keeps {fewest[0] // needy.groups} channels" if needy.groups > 1
            else f"each token takes {needy.least} of a layer's {needy.size} {needy.name}"
        )  # fmt: skip
        raise InputError(
            f"decisions.target_keep is {target}, but {takes}, and so many are {least:.4f} of the decoder: choose at "
            "least that"
        )


def nearest_kept(config: ATPConfig, shapes: PretrainedConfig) -> float:
    """The share of decoder parameters nearest to the target that the decisions of a run can keep, in (0, 1]."""
    budget, rules = _rules(config, shapes)
    target = config.decisions.target_keep
    if not config.decisions.uniform:
        return nearest_share(budget, target, rules, blocks=config.decisions.blocks)
    return min((share_of(budget, counts) for counts in equal_counts(budget, target, rules)),
               key=lambda share: abs(share - target))  # fmt: skip


def rounding(config: ATPConfig, shapes: PretrainedConfig) -> float:
    """How far from the target the share kept may end because all layers are equal, of the decoder; else 0.

    The shares that equal layers can keep are as far apart as one block in every layer. Half of that step is allowed.
    """
    return half_block(*_rules(config, shapes)) if config.decisions.uniform else 0.0


def _rules(config: ATPConfig, shapes: PretrainedConfig) -> tuple[Budget, dict[str, int]]:
    decisions = config.decisions
    space = MaskSpace.from_config(shapes, decisions.space)
    if decisions.uniform:
        require_equal_layers(space)
    budget = Budget(space)
    return budget, width_rules(budget, decisions.target_keep, decisions.multiples, blocks=decisions.blocks)


def check_phases(config: ATPConfig) -> None:
    """Raises `InputError` if decisions have no steps to come from."""
    source, training = config.decisions.source, config.training
    if source == "learned" and not training.search:
        raise InputError(
            "training.search is 0, so nothing can be learned: set it, or take decisions.source=tuned, which needs none"
        )
    if source == "running" and not training.opened + training.search:
        raise InputError("decisions.source=running watches open and search steps: set training.open or training.search")


def check_base_alone(config: ATPConfig, count: int | None = None) -> None:
    """Raises `InputError` for settings under which a quantized base is not supported, or would save no memory.

    count: of processes, default that of now.
    """
    load_in = config.model.load_in
    if load_in is None:
        return
    count = count or processes.count()
    if count > 1:
        raise InputError(
            f"model.load_in={load_in} trains in one process, not in {count}: start without torchrun, or "
            "leave out model.load_in"
        )


def check_sharded(config: ATPConfig, shared: bool | None = None) -> None:
    """Raises `InputError` for settings under which weights cannot be shared among processes.

    shared: whether they are to be, default whether they are now.
    """
    if not (processes.sharded() if shared is None else shared):
        return
    if config.evaluation.dense_baseline:
        raise InputError(
            "evaluation.dense_baseline trains a model of its own, which training.sharding=fsdp does not shard: set "
            "evaluation.dense_baseline=false, or leave out training.sharding"
        )
    if config.training.beside_lora:
        key = "embeddings=true" if config.training.embeddings else "after_cut=full"
        raise InputError(
            f"training.{key} trains weights of which training.sharding=fsdp leaves a process a part: leave out one of "
            "them"
        )
    if config.vocabulary.keep is not None:
        raise InputError(
            "vocabulary.keep takes rows out of a whole embedding, of which training.sharding=fsdp leaves a process a "
            "part: leave out one of them"
        )
    if config.lora.variant == "dora":
        raise InputError(
            "lora.variant=dora reads the norms of whole rows, of which training.sharding=fsdp leaves a process a part: "
            "set lora.variant=rslora or lora, or leave out training.sharding"
        )


def base_remark(config: ATPConfig) -> list[str]:
    """A sentence on what `model.load_in` does to the run's figures; none without it."""
    if config.model.load_in is None:
        return []
    from atp.models.base import FORMS  # which imports the classes of models, and that takes seconds

    return [
        f"decoder linears are held as {FORMS[config.model.load_in].says}: scores of the original and the certificate "
        "are of these weights"
    ]


def sharding_remark(config: ATPConfig, count: int) -> list[str]:
    """A sentence on `training.sharding` where there is nobody to share with; else none. count: of processes."""
    if config.training.sharding is None or count > 1:
        return []
    return [
        f"training.sharding={config.training.sharding} shares weights among processes, and one process holds them "
        "whole: start with torchrun --nproc_per_node N"
    ]


def rounded(config: ATPConfig, shapes: PretrainedConfig) -> list[str]:
    """A sentence on the share that is kept, where equal layers cannot meet the target closely; else none."""
    target, nearest = config.decisions.target_keep, nearest_kept(config, shapes) if config.decisions.uniform else 0.0
    if not config.decisions.uniform or abs(nearest - target) <= BUDGET_TOLERANCE:
        return []
    most = target + rounding(config, shapes)
    return [f"equal layers keep between {2 * target - most:.3f} and {most:.3f} of the decoder, not just {target:g}"]


def recipe(config: ResolvedConfig) -> list[str]:
    """One sentence per setting that takes away what another one is for; none where they agree."""
    training, found = config.training, []
    meant = PRESETS.get(config.preset, {}).get("training", {}).get("steps", 0)
    if training.total < meant / 2:
        found.append(
            f"preset {config.preset} is for {meant} steps, and this run takes {training.total}: leave out "
            "training.steps, or take preset=auto, which goes by the steps"
        )
    if config.decisions.source == "tuned" and training.opened + training.search == 0:
        found.append("decisions.source=tuned judges the model before any tuning, since training.open is 0: set it")
    return found


def run_remarks(asked: ATPConfig, config: ResolvedConfig, shapes: PretrainedConfig, data: RunData) -> list[str]:
    """All that is said of the settings, the base and the data before a run. config: what was asked for, resolved."""
    count = processes.count()
    of_base = [*recipe(config), *rounded(config, shapes), *base_remark(config), *sharding_remark(config, count)]
    of_data = [*shortfalls(config, data), *few_scored(asked, data, count)]
    return [*of_base, *of_data, *rereads(config, steps_per_epoch(config, len(data.train), count))]


def outline(config: ResolvedConfig, model: PreTrainedModel, data: RunData) -> list[str]:
    """What a run will do, in a few lines; the folder has all settings."""
    from atp.models.base import FORMS

    training, decisions, evaluation = config.training, config.decisions, config.evaluation
    kind, count = model.config.model_type, sum(p.numel() for p in model.parameters())
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    held = f", its decoder linears as {FORMS[config.model.load_in].says}" if config.model.load_in else ""
    parts = {"train": data.train, "calibration": data.calibration, "validation": data.validation, "test": data.test}
    counts = ", ".join(f"{len(part):,} {name}" for name, part in parts.items() if part is not None)
    several = f" in each of {processes.count()} processes" if processes.count() > 1 else ""
    size = training.batch_size * training.gradient_accumulation
    read = f"{size} sample{'s' if size > 1 else ''}"
    parameters = f"{count / 1e6:,.1f} million parameters" if count >= 1e6 else f"{count:,} parameters"
    epochs = training.total / steps_per_epoch(config, len(data.train), processes.count())
    after = training.total - training.opened - training.search - training.settle
    phases = {"open": training.opened, "search": training.search, "settle": training.settle, "tune": after}
    steps = ", ".join(f"{name} {steps:,}" for name, steps in phases.items() if steps)
    asked = f", {evaluation.questions:,} questions of each task" if data.splits.tasks and evaluation.questions else ""
    dense = "; the whole model is tuned too, for comparison" if evaluation.dense_baseline else ""
    return [
        f"model: {config.model.path} ({kind}, {parameters} in {dtype}{held})",
        f"data: {data.splits.description}",
        f"samples of up to {config.data.length:,} tokens: {counts}",
        f"steps: {training.total:,} ({steps}), each of {read}{several}, {epochs:.2g} epochs",
        *([f"trained besides LoRA: {training.beside_lora}"] if training.beside_lora else []),
        f"products: in {training.precision} on {processes.device().type}",
        f"target: {decisions.target_keep:.4g} of the decoder, in space {decisions.space}, source {decisions.source}",
        f"scores: perplexity of {min(evaluation.windows, len(data.test)):,} windows{asked}{dense}",
        f"folder: {config.output_dir}, settings in resolved.yaml (atp watch {config.output_dir} shows the run)",
    ]


def shortfalls(config: ResolvedConfig, data: RunData) -> list[str]:
    """One sentence per setting that asks for more than the data hold; the run continues with what there is."""
    evaluation, test = config.evaluation, data.splits.test
    found = [
        f"{key} is {count}, but there are only {there} {what}"
        for key, count, what, there in _asked(config, data)
        if count > there
    ]
    if config.data.packing == "padded" and data.train.longer:
        found.append(
            f"{data.train.longer:,} of {len(data.train):,} training samples are longer than data.length="
            f"{config.data.length} and lose their beginning: raise it"
        )
    held = set(values(test, "label")) if config.data.labels else set()
    unused = [label for label in config.data.labels if label not in held]
    if unused:
        found.append(f"no test example has the label {shorten(' or '.join(unused))} of data.labels")
    if evaluation.answers and not (evaluation.questions and any(task.labels for task in data.splits.tasks)):
        found.append("evaluation.answers is true, but no task with labels is scored")
    return found


def within_data(config: ResolvedConfig, data: RunData) -> dict[str, int]:
    """The settings, by key, that ask for more than the data hold, with what these hold."""
    asked = sorted(_asked(config, data), key=lambda one: -one[3])  # of several tasks the one with fewest questions
    return {key: there for key, count, _, there in asked if count > there}


def _asked(config: ResolvedConfig, data: RunData) -> list[tuple[str, int, str, int]]:
    """(key, its value, of what, how much of it the data hold) of the settings that ask for held-out data."""
    evaluation, decisions = config.evaluation, config.decisions
    asked = [
        ("evaluation.windows", evaluation.windows, "test windows", len(data.test)),
        ("decisions.refit_windows", decisions.refit_windows, "calibration samples", len(data.calibration)),
    ]
    measured = decisions.source in ("static", "tuned") and decisions.path is None
    if measured or (decisions.source == "learned" and decisions.init == "saliency"):
        asked.append(
            ("decisions.saliency_windows", decisions.saliency_windows, "calibration samples", len(data.calibration))
        )
    for task in data.splits.tasks:
        if not (task.labels or evaluation.generate):
            continue  # free text is scored on demand
        held_out = values(data.splits.test, "task").count(task.name)
        asked.append(("evaluation.questions", evaluation.questions, f"test examples of {task.name}", held_out))
    return asked


def steps_per_epoch(config: ATPConfig, samples: int, count: int) -> float:
    """In how many steps a run reads each of its training samples once. count: of processes."""
    training = config.training
    return samples / (training.batch_size * training.gradient_accumulation * count)


def few_scored(config: ATPConfig, data: RunData, count: int) -> list[str]:
    """A sentence where a step has few tokens with a loss: what follows, or that it may learn nothing. count: processes.

    The latter where the config has a rate of its own that so few do not bear. config: as it was asked for, since a
    resolved one always has a rate.
    """
    training = config.training
    rows = scored_per_sample(data.train) * training.gradient_accumulation * count
    scored = rows * training.batch_size
    learns = f"a step learns from {scored:.0f}"
    if training.lr is None and scored < ENOUGH_SCORED:
        clips = " and training.update_clipping is true" if training.update_clipping is None else ""
        return [
            f"{learns} tokens on average, fewer than {ENOUGH_SCORED}, so training.lr is "
            f"{training.rate(scored):.2g}{clips}"
        ]
    if training.lr is None or training.lr <= _RATE or scored >= _FEW:
        return []
    return [
        f"{learns} tokens on average, and with fewer than {_FEW} and training.lr={training.lr:g} a run may learn "
        f"nothing: leave out training.lr, or set training.batch_size={math.ceil(ENOUGH_SCORED / rows)}"
    ]


def rereads(config: ATPConfig, epoch: float) -> list[str]:
    """A sentence where samples are read so often that they may be learned by heart, and the last adapter stays.

    epoch: `steps_per_epoch`.
    """
    total = config.training.total
    if not reads_often(config, epoch):
        return []
    every = f"evaluation.every={scored_every(config)} " if config.evaluation.every is None else ""
    return [
        f"each training sample is read {total / epoch:.1f} times, and a model that learns them by heart gets worse on "
        f"other text: take fewer steps, or set {every}training.keep_best=true to end with the best adapter on the way"
    ]


def reads_often(config: ATPConfig, epoch: float) -> bool:
    """Whether a run that ends with its last adapter reads samples so often that it may learn them by heart."""
    return config.training.total > _OFTEN * epoch and not config.training.keep_best


def scored_every(config: ATPConfig) -> int:
    """`evaluation.every` that is advised where a run ends with its best adapter."""
    return max(config.training.total // _SCORES, 1)


def less_memory(config: ATPConfig) -> str:
    """The three cheapest changes that lower a run's memory, as overrides: those that keep its result come first."""
    training, decisions, data = config.training, config.decisions, config.data
    changes = []
    if training.batch_size > 1:
        kept = training.batch_size * training.gradient_accumulation
        half = next(size for size in range(training.batch_size // 2, 0, -1) if kept % size == 0)
        changes.append(f"training.batch_size={half} training.gradient_accumulation={kept // half}")
    if not training.gradient_checkpointing:
        changes.append("training.gradient_checkpointing=true")
    elif not training.offload:
        changes.append("training.offload=true")
    if config.evaluation.batch_size > 1:
        changes.append(f"evaluation.batch_size={config.evaluation.batch_size // 2}")
    if decisions.batch_size > 1:
        changes.append(f"decisions.batch_size={decisions.batch_size // 2}")
    if data.length > _SHORTEST:
        changes.append(f"data.length={max(data.length // 2, _SHORTEST)}")
    if not changes:
        return "take a smaller model or a machine with more memory"
    return f"start a new run with {', with '.join(changes[:3])}"
