"""Speed and size of a model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import BaseStreamer

from atp.errors import InputError
from atp.evaluation.inference import CausalLM, inference
from atp_kernels import QuantizedWeight


def throughput(model: CausalLM, **sizes: int) -> dict[str, float]:
    """How fast one model reads and writes; see `throughputs`, whose keyword arguments `sizes` are."""
    return throughputs([model], **sizes)[0]


def throughputs(
    models: Sequence[CausalLM],
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
) -> list[dict[str, float]]:
    """Tokens per second over the whole batch, medians of `repeats` after a warm-up, in each model's own dtype.

    The models take turns, so that whatever else the machine does meets all of them alike.

    That is how a user runs the model. Under autocast, which a run trains and scores in, each new token would first cast
    every float32 weight.

    prefill_tokens_per_second: one forward pass over `prompt_tokens` tokens that fills the cache.
    decode_tokens_per_second: greedy `generate`, from the first to the last of `new_tokens` new tokens.
    Raises `InputError` for a size below 1.
    """
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size, "repeats": repeats}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"there is no speed with {name}={size}: give at least 1")
    for model in models:
        _seconds(model, prompt_tokens, 1, batch_size)  # a warm-up, for which one step of decoding is enough
    rounds = [[_seconds(model, prompt_tokens, new_tokens, batch_size) for model in models] for _ in range(repeats)]
    found = []
    for taken in zip(*rounds, strict=True):
        prefill, decode = map(statistics.median, zip(*taken, strict=True))
        found.append({
            "prefill_tokens_per_second": batch_size * prompt_tokens / prefill,
            "decode_tokens_per_second": batch_size * new_tokens / decode,
        })  # fmt: skip
    return found


def _seconds(model: CausalLM, prompt_tokens: int, new_tokens: int, batch_size: int) -> tuple[float, float]:
    """(seconds of one prefill, seconds of the new tokens after the first)."""
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens + 1, min_new_tokens=new_tokens + 1, pad_token_id=0
    )
    with inference(model) as device:
        # Token values do not affect time; small ids exist in any vocabulary.
        prompt = (torch.arange(prompt_tokens, device=device) % 16).repeat(batch_size, 1)
        start = _now(device)
        model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        prefill = _now(device) - start
        clock = _TokenClock(device)
        cast(GenerationMixin, model).generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy, streamer=clock
        )
    # Readings: the prompt's echo, the token from prefill, then one per decode step.
    return prefill, clock.readings[-1] - clock.readings[1]


def model_size(model: CausalLM) -> dict[str, float]:
    """Parameters and weight size: {params, decoder_params, megabytes}.

    params: all weights, tied ones once. decoder_params: those of the decoder layers (linears and norms), without
    embeddings, final norm and lm_head. megabytes: 10^6 bytes of `params` in their dtype, or as they are packed if they
    are quantized, as a file holds them; a base that `model.load_in` quantizes in memory counts in its dtype. LoRA
    factors are not counted, since they merge into the weights.
    """
    counted = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    params = sum(_weights(p) for p in counted.values())
    decoder = sum(_weights(p) for name, p in counted.items() if ".layers." in f".{name}")
    return {"params": params, "decoder_params": decoder, "megabytes": sum(map(_bytes, counted.values())) / 1e6}


def _weights(parameter: Tensor) -> int:
    """The weights that a parameter stands for; bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _bytes(parameter: Tensor) -> int:
    """Bytes of a parameter with the scales that belong to it; torchao shows the dtype that it computes in."""
    if isinstance(parameter, QuantizedWeight) or hasattr(parameter, "to_local"):  # in shards
        return parameter.numel() * parameter.itemsize
    if hasattr(parameter, "__tensor_flatten__"):
        return sum(getattr(parameter, name).nbytes for name in parameter.__tensor_flatten__()[0])
    state = getattr(parameter, "quant_state", None)
    return parameter.nbytes + (0 if state is None else state.absmax.nbytes)


class _TokenClock(BaseStreamer):
    """Records when `generate` produces each token."""

    def __init__(self, device: torch.device):
        self.device = device
        self.readings: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called once with the prompt, then once per new token."""
        self.readings.append(_now(self.device))

    def end(self) -> None:
        """Called after the last token."""


def _now(device: torch.device) -> float:
    """Seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
