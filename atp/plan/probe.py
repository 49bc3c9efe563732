"""How fast this machine computes what a plan counts: a few steps of some decoder layers of the real widths."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from atp.data import collate
from atp.decide.maker import frozen
from atp.evaluation.inference import inference
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.models.attention import use_training_attention
from atp.plan.cost import Cost, Flops, PhaseCost, moments, solution
from atp.plan.job import Workload
from atp.plan.latency import now, one_layer
from atp.plan.shapes import Layers, ModelShapes, mask_of
from atp.processes import processes
from atp.removal import cut_model
from atp.removal.certify import reference_logits
from atp.removal.refit import DAMPINGS, Pair, in_place, moments_of
from atp.spaces.space import MaskSpace
from atp.training.cross_entropy import held_heads, linear_cross_entropy
from atp.training.data import refit_size
from atp.training.loss import causal_lm_loss
from atp.training.offload import Offload, recompute_layers

_SECONDS = 1.5  # for each speed
_WORDS = 16  # the vocabulary of the layers that are timed: their head must cost nothing
_ROWS = 512  # tokens of the head that is timed, at most
_TOKENS, _WIDEST = 4096, 2048  # tokens and inputs of the refit's products that are timed, at most
_QUICK = 1e9  # weights of a layer times tokens of a step, up to which one step of each kind takes a few seconds
_LAYERS, _LAYERS_BYTES = 4, 256 * 2**20  # that are timed together, at most; a single one may have more bytes


def is_quick(job: Workload) -> bool:
    """Whether `flop_rates` of one layer, without repetition, take no more than a few seconds."""
    window = max(job.config.training.batch_size * job.sample, job.calibrated)
    scored = job.config.evaluation.batch_size * job.config.data.length
    return job.shapes.whole[0].weights * max(window, scored / 4) <= _QUICK  # scoring has no backward pass


def flop_rates(job: Workload, seconds: float = _SECONDS, layers: int = _LAYERS) -> Flops:
    """Operations per second of each kind.

    layers: how many are timed together, at most. Each is measured for about `seconds`, at least once, after one step to
    warm up, in the precision and on the device of the run:
    forward, backward and optimizer of a LoRA step of layers with random weights, which collects saliency if those of
    the run do; forward and backward of a calibration window that measures saliency; the cross-entropy of as many tokens
    as a batch scores; the refit's passes through the whole and the masked model, its products and one of its systems; a
    pass of the certificate over one window, and one over the windows that are scored at once. LoRA steps and the refit
    have batches like those of the run, because short ones are slower per token, and LoRA steps have checkpointing and
    offloading as that has them. What is no product (norms, activations, casts) is part of a layer's time.
    """
    device, training = processes.device(), job.config.training
    layer = sum(linear.out_features * linear.in_features for linear in job.shapes.whole[0].linears.values())
    count = min(max(_LAYERS_BYTES // (layer * job.dtype.itemsize), 1), layers, job.shapes.layers)
    shapes = ModelShapes.of(one_layer(job.shapes.config, _WORDS, count), _same_multiples(job))
    window, sample = max(round(job.calibrated), 2), max(round(job.sample), 2)

    def random(make: Callable[[PreTrainedModel], Any]) -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            return make(AutoModelForCausalLM.from_config(shapes.config, dtype=job.dtype))

    def cost(length: int) -> Cost:
        return Cost(Workload.of(job.config, shapes, autocast=job.autocast, device=job.device, sample=length))

    def rate(make: Callable[[PreTrainedModel], PeftModel], widths: Layers, soft: bool = False) -> float:
        step = _layers_step(random(make), job, device, sample, training.batch_size, shapes.space if soft else None)
        return cost(sample).step(widths).total * training.batch_size * sample / _median(step, device, seconds)

    def ours(model: PreTrainedModel, **changes: Any) -> PeftModel:
        return add_lora(model, shapes.space, **job.config.lora.model_dump() | changes).train()

    def masked(model: PreTrainedModel) -> PeftModel:
        return ours(model, variant="lora")  # DoRA is merged by then

    def cut(model: PreTrainedModel) -> PeftModel:
        smaller: Any = cut_model(model, shapes.space, mask_of(shapes.space, shapes.counts))
        return ours(smaller)

    model = random(masked)
    tokens = torch.arange(window)[None] % _WORDS
    certifying = _median(partial(reference_logits, model, tokens), device, seconds)
    with frozen(model):
        measuring = _median(_layers_step(model, job, device, window, 1, shapes.space), device, seconds)
    length, at_once = job.config.data.length, job.config.evaluation.batch_size
    evaluating = _median(_scoring_step(random(lambda model: model), job, length, at_once), device, seconds)
    step = rate(ours, shapes.whole, soft=job.config.decisions.source == "running")
    rows = min(max(round(training.batch_size * job.sample * job.scored), 1), _ROWS)
    sizes = job.shapes.config
    with held_heads():
        scoring = _median(_head_step(job, device, rows), device, seconds)
    windows, fitted = job.config.decisions.refit_windows, 0.0
    if job.refits:
        read = window * refit_size(window, windows)
        fitting = _median(_refit_step(model, job, window, read // window, shapes), device, seconds)
        fitted = 2 * cost(window).forward(shapes.whole, scored=0.0).total * read / fitting
    summed, solved = _of_refit(job, device, seconds)
    return Flops(
        whole=cost(window).decision().total * window / measuring,
        step=step,
        cut=rate(cut, shapes.kept),
        head=4.0 * sizes.hidden_size * sizes.vocab_size * rows / scoring,
        fitted=fitted,
        moments=summed,
        solved=solved,
        certified=cost(window).forward(shapes.whole).total * window / certifying,
        scored=cost(length).forward(shapes.whole, lora=False).total * length * at_once / evaluating,
    )


def seconds_of(row: PhaseCost, speed: Flops) -> float:
    """How long a part of a run takes at these flop_rates (operations per second of each kind)."""
    kinds = zip(row.flops.by_kind, speed.by_kind, strict=True)
    return sum(done / per_second for done, per_second in kinds if done)


def _same_multiples(job: Workload) -> Any:
    """The decisions' settings with the width rules of the whole model, which one layer alone might change."""
    return job.config.decisions.model_copy(update={"multiples": job.shapes.multiples})


def _layers_step(
    model: PeftModel, job: Workload, device: torch.device, length: int, rows: int, soft: MaskSpace | None
) -> Callable[[], object]:
    """A step on a batch of rows with `length` tokens; soft: the space whose decisions it says the worth of.

    A frozen adapter makes it a pass that measures saliency, under a soft mask.
    """
    base: Any = model.get_base_model()
    use_training_attention(base)
    if job.config.training.gradient_checkpointing:
        recompute_layers(model)
    offload = Offload(_existing(Path(job.config.output_dir)) if job.config.training.offload else None)
    row = {"input_ids": torch.arange(length) % _WORDS, "labels": torch.arange(length) % _WORDS}
    if job.keeps_apart:
        row["position_ids"] = torch.arange(length) % -(-length // 2)  # two samples
    batch = collate([row] * rows)
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True) if trained else None
    controller = None if soft is None else MaskController(model, soft)

    def step() -> None:
        if controller is not None and soft is not None and not trained:
            controller.set(torch.ones(soft.size, device=device, requires_grad=True), "soft")
        observer = controller.observer if controller is not None and trained else None
        precision = torch.autocast(device.type, dtype=job.autocast, enabled=job.autocast is not None)
        with nullcontext() if observer is None else observer.observing(rows) as sums:
            with precision, offload.saving(model):
                loss = causal_lm_loss(model, batch)
            loss.backward()
        if observer is not None and sums is not None:
            observer.gradients(sums)
        if controller is not None:
            controller.clear()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trained, job.config.training.clip)
            optimizer.step()
            optimizer.zero_grad()

    return step


def _scoring_step(model: PreTrainedModel, job: Workload, length: int, rows: int) -> Callable[[], object]:
    """A pass that scores `rows` windows of `length` tokens."""

    def step() -> None:
        with inference(model, job.autocast) as device:
            model(input_ids=(torch.arange(length, device=device) % _WORDS).repeat(rows, 1), use_cache=False)

    return step


def _refit_step(model: PeftModel, job: Workload, length: int, rows: int, shapes: ModelShapes) -> Callable[[], object]:
    """What the refit reads a batch with: passes through the layers without masks and with those of the cut."""
    decoder: Any = cast(PreTrainedModel, model.get_base_model()).get_decoder()
    controller, mask = MaskController(model, shapes.space), mask_of(shapes.space, shapes.counts)

    def step() -> None:
        with inference(model, job.autocast) as device:
            tokens = (torch.arange(length, device=device) % _WORDS).repeat(rows, 1)
            decoder(input_ids=tokens, use_cache=False)
            with controller.masks(mask, "sum"):
                decoder(input_ids=tokens, use_cache=False)

    return step


def _existing(folder: Path) -> Path:
    """The folder itself or the nearest one above it that is there, since a plan makes none."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _head_step(job: Workload, device: torch.device, rows: int) -> Callable[[], object]:
    sizes = job.shapes.config
    states = torch.randn(rows, sizes.hidden_size, device=device, dtype=job.dtype, requires_grad=True)
    entries = torch.randn(sizes.vocab_size, sizes.hidden_size, device=device, dtype=job.dtype)
    head = nn.Parameter(entries, requires_grad=False)
    targets = torch.arange(rows, device=device) % sizes.vocab_size

    def step() -> None:
        with torch.autocast(device.type, dtype=job.autocast, enabled=job.autocast is not None):
            linear_cross_entropy(states, head, targets).backward()
        states.grad = None

    return step


def _of_refit(job: Workload, device: torch.device, seconds: float) -> tuple[float, float]:
    """Operations per second of the refit's moments and of its solutions, at the size of its widest linear."""
    windows = job.share_of(job.config.decisions.refit_windows)
    widths = [
        job.shapes.kept[structure.layer].linears[structure.reader].in_features
        for structure in job.shapes.space.structures
        if structure.reader is not None
    ]
    if not windows or not widths:
        return 0.0, 0.0
    width, outputs = min(max(widths), _WIDEST), min(job.shapes.config.hidden_size, _WIDEST)
    tokens = min(windows * job.config.data.length, _TOKENS)
    dtype = job.autocast or job.dtype
    inputs = torch.randn(tokens, width, device=device, dtype=dtype)
    lost = torch.randn(tokens, outputs, device=device, dtype=job.dtype)
    weight = lost.new_empty(outputs, width)
    kept = torch.ones(width, dtype=torch.bool, device=device)
    add_up = partial(moments_of, [Pair(0, in_place(inputs), in_place(lost))], weight=weight, kept=kept, together=False)
    solve = partial(add_up().ridge, DAMPINGS[-1], torch.float64)
    summed, solved = (_median(step, device, seconds) for step in (add_up, solve))
    return moments(tokens, width, outputs) / summed, solution(width, outputs) / solved


def _median(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds that a step takes, the median over about `seconds` after a first one."""
    step()
    times: list[float] = []
    while not times or sum(times) < seconds:
        started = now(device)
        step()
        times.append(now(device) - started)
    return statistics.median(times)
