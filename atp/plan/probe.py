"""How fast this machine computes what a plan counts: a few steps of one decoder layer of the real widths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PretrainedConfig

from atp import processes
from atp.data import collate
from atp.lora.layer import add_lora
from atp.models.attention import use_training_attention
from atp.plan.cost import Cost, Flops, Row
from atp.plan.job import Job
from atp.plan.shapes import LayerWidths, ModelShapes, mask_of
from atp.removal import cut_model
from atp.training.cross_entropy import linear_cross_entropy
from atp.training.loss import causal_lm_loss

_SECONDS = 1.5  # for each of the three
_WORDS = 16  # the vocabulary of the layer that is timed: its head must cost nothing
_ROWS = 512  # tokens of the head that is timed
_PER_LAYER = ("layer_types", "no_rope_layers")  # lists in a config with an entry per layer


def speeds(job: Job, seconds: float = _SECONDS) -> Flops:
    """Operations per second in a layer of the whole model, in one of the cut model, and in the head.

    Each is measured for about `seconds` after one step to warm up: forward and backward of a LoRA step of one layer
    with random weights, and of the cross-entropy of 512 tokens, in the precision and on the device of the run. What is
    no product (norms, activations) is part of a layer's time.
    """
    device = processes.device()
    shapes = ModelShapes.of(one_layer(job.shapes.config), _same_multiples(job))
    small = Job.of(job.config, shapes, autocast=job.autocast, device=job.device)
    lora = job.config.lora
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shapes.config, dtype=job.dtype)
    whole = add_lora(model, shapes.space, r=lora.r, alpha=lora.alpha, dropout=lora.dropout).train()
    cut: Any = cut_model(whole, shapes.space, mask_of(shapes.space, shapes.counts))
    tokens = job.config.training.batch_size * job.config.data.length

    def rate(layer: PeftModel, widths: LayerWidths) -> float:
        flops = Cost(small).step(widths).total * tokens
        return flops / _median(_layer_step(layer, job, device), device, seconds)

    sizes = job.shapes.config
    head = 4.0 * sizes.hidden_size * sizes.vocab_size * _ROWS
    head_rate = head / _median(_head_step(job, device), device, seconds)
    return Flops(rate(whole, shapes.whole), rate(cut, shapes.kept), head_rate)


def seconds_of(row: Row, speed: Flops) -> float:
    """How long a part of a run takes at these speeds (operations per second of each kind)."""
    return sum(done / per_second for done, per_second in zip(row.flops.by_kind, speed.by_kind, strict=True))


def one_layer(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a model with one such layer and next to no vocabulary."""
    values = config.to_dict()
    values |= {key: values[key][:1] for key in _PER_LAYER if isinstance(values.get(key), list)}
    values |= {"num_hidden_layers": 1, "vocab_size": _WORDS, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    return type(config).from_dict(values)


def _same_multiples(job: Job) -> Any:
    """The decisions' settings with the width rules of the whole model, which one layer alone might change."""
    return job.config.decisions.model_copy(update={"multiples": job.shapes.multiples})


def _layer_step(model: PeftModel, job: Job, device: torch.device) -> Callable[[], object]:
    training, length = job.config.training, job.config.data.length
    base: Any = model.get_base_model()
    use_training_attention(base)
    row = {"input_ids": torch.arange(length) % _WORDS, "labels": torch.arange(length) % _WORDS}
    batch = collate([row] * training.batch_size)
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    def step() -> None:
        with torch.autocast(device.type, dtype=job.autocast, enabled=job.autocast is not None):
            loss = causal_lm_loss(model, batch)
        loss.backward()
        model.zero_grad()

    return step


def _head_step(job: Job, device: torch.device) -> Callable[[], object]:
    sizes = job.shapes.config
    states = torch.randn(_ROWS, sizes.hidden_size, device=device, dtype=job.dtype, requires_grad=True)
    head = torch.randn(sizes.vocab_size, sizes.hidden_size, device=device, dtype=job.dtype)
    targets = torch.arange(_ROWS, device=device) % sizes.vocab_size

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
        started = _now(device)
        step()
        times.append(_now(device) - started)
    return statistics.median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
