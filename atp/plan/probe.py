"""How fast this machine computes what a plan counts: a few steps of some decoder layers of the real widths."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from atp import processes
from atp.baselines.tuner import stock_lora
from atp.data import collate
from atp.latency import now, one_layer
from atp.lora.layer import add_lora
from atp.models.attention import use_training_attention
from atp.plan.cost import Cost, Flops, Row
from atp.plan.job import Job
from atp.plan.shapes import Layers, ModelShapes, mask_of
from atp.removal import cut_model
from atp.training.cross_entropy import linear_cross_entropy
from atp.training.loss import causal_lm_loss

_SECONDS = 1.5  # for each speed
_WORDS = 16  # the vocabulary of the layers that are timed: their head must cost nothing
_ROWS = 512  # tokens of the head that is timed, at most
_LAYERS, _LAYERS_BYTES = 4, 256 * 2**20  # that are timed together, at most; a single one may have more bytes


def speeds(job: Job, seconds: float = _SECONDS) -> Flops:
    """Operations per second of each kind; 0 for stock LoRA without a dense baseline.

    Each is measured for about `seconds` after one step to warm up: forward, backward and optimizer of a LoRA step of
    layers with random weights, and the cross-entropy of as many tokens as a batch scores, in the precision and on the
    device of the run. LoRA steps have batches as long as those of training, because short ones are slower per token.
    What is no product (norms, activations) is part of a layer's time.
    """
    device, training = processes.device(), job.config.training
    layer = sum(linear.out_features * linear.in_features for linear in job.shapes.whole[0].linears.values())
    count = min(max(_LAYERS_BYTES // (layer * job.dtype.itemsize), 1), _LAYERS, job.shapes.layers)
    shapes = ModelShapes.of(one_layer(job.shapes.config, _WORDS, count), _same_multiples(job))
    window, sample = job.config.data.length, max(round(job.sample), 2)

    def rate(make: Callable[[PreTrainedModel], PeftModel], widths: Layers, length: int) -> float:
        torch.manual_seed(0)
        with torch.device(device):
            model = make(AutoModelForCausalLM.from_config(shapes.config, dtype=job.dtype))
        small = Job.of(job.config, shapes, autocast=job.autocast, device=job.device, sample=length)
        flops = Cost(small).step(widths).total * training.batch_size * length
        return flops / _median(_layers_step(model, job, device, length), device, seconds)

    def ours(model: PreTrainedModel) -> PeftModel:
        lora = job.config.lora
        return add_lora(model, shapes.space, r=lora.r, alpha=lora.alpha, dropout=lora.dropout).train()

    def cut(model: PreTrainedModel) -> PeftModel:
        smaller: Any = cut_model(ours(model), shapes.space, mask_of(shapes.space, shapes.counts))
        return smaller

    def dense(model: PreTrainedModel) -> PeftModel:
        return stock_lora(model, job.config).train()

    whole = rate(ours, shapes.whole, window)
    step = whole if sample == window else rate(ours, shapes.whole, sample)
    stock = rate(dense, shapes.whole, sample) if job.config.evaluation.dense_baseline else 0.0
    rows = min(max(round(training.batch_size * job.sample * job.scored), 1), _ROWS)
    sizes = job.shapes.config
    head = 4.0 * sizes.hidden_size * sizes.vocab_size * rows / _median(_head_step(job, device, rows), device, seconds)
    return Flops(whole=whole, step=step, stock=stock, cut=rate(cut, shapes.kept, sample), head=head)


def seconds_of(row: Row, speed: Flops) -> float:
    """How long a part of a run takes at these speeds (operations per second of each kind)."""
    kinds = zip(row.flops.by_kind, speed.by_kind, strict=True)
    return sum(done / per_second for done, per_second in kinds if done)


def _same_multiples(job: Job) -> Any:
    """The decisions' settings with the width rules of the whole model, which one layer alone might change."""
    return job.config.deciding.model_copy(update={"multiples": job.shapes.multiples})


def _layers_step(model: PeftModel, job: Job, device: torch.device, length: int) -> Callable[[], object]:
    """A LoRA step on a batch of rows with `length` tokens."""
    training = job.config.training
    base: Any = model.get_base_model()
    use_training_attention(base)
    row = {"input_ids": torch.arange(length) % _WORDS, "labels": torch.arange(length) % _WORDS}
    batch = collate([row] * training.batch_size)
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype=job.autocast, enabled=job.autocast is not None):
            loss = causal_lm_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _head_step(job: Job, device: torch.device, rows: int) -> Callable[[], object]:
    sizes = job.shapes.config
    states = torch.randn(rows, sizes.hidden_size, device=device, dtype=job.dtype, requires_grad=True)
    head = torch.randn(sizes.vocab_size, sizes.hidden_size, device=device, dtype=job.dtype)
    targets = torch.arange(rows, device=device) % sizes.vocab_size

    def step() -> None:
        with torch.autocast(device.type, dtype=job.autocast, enabled=job.autocast is not None):
            linear_cross_entropy(states, head, targets).backward()
        states.grad = None

    return step


def _median(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds that a step takes, the median over about `seconds` after a first one."""
    step()
    times: list[float] = []
    while not times or sum(times) < seconds:
        started = now(device)
        step()
        times.append(now(device) - started)
    return statistics.median(times)
