"""Speed and size of a model."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import BaseStreamer

from atp.evaluation.bootstrap import COVERAGE
from atp.evaluation.inference import CausalLM, inference
from atp.ground.errors import InputError
from atp_kernels import QuantizedWeight

_LEAST, _MOST = 3, 50  # rounds
_NARROW = 0.1  # width of an interval, as a share of its median, at which no more rounds are needed


def throughput(model: CausalLM, **sizes: Any) -> dict[str, Any]:
    """How fast one model reads and writes; see `throughputs`, whose keyword arguments `sizes` are."""
    return throughputs([model], **sizes)[0]


def throughputs(
    models: Sequence[CausalLM],
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 16,
    batch_size: int = 1,
    repeats: int | None = None,
    seconds: float = 20.0,
    agreed: Callable[[Callable[[], bool]], bool] | None = None,
) -> list[dict[str, Any]]:
    """Tokens per second over the whole batch, medians over rounds after a warm-up, in each model's own dtype.

    In a round every model is timed once, so that whatever else the machine does meets all of them alike. Rounds end
    when each interval is narrower than a tenth of its median, at the earliest after three, or when they have taken
    `seconds`. repeats: a number of rounds instead. agreed: called with the question whether rounds end, returns one
    answer in all processes. Processes that share the weights of a model need it, because their clocks differ.

    That is how a user runs the model. Under autocast, which a run trains and scores in, each new token would first cast
    every float32 weight.

    prefill_tokens_per_second: one forward pass over `prompt_tokens` tokens that fills the cache.
    decode_tokens_per_second: greedy `generate` after it, over `new_tokens` new tokens.
    Each has beside it its `median_interval` under the same name with `_interval`; speed_repeats: the rounds.
    Raises `InputError` for a size below 1.
    """
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size}
    for name, size in (sizes | ({} if repeats is None else {"repeats": repeats})).items():
        if size < 1:
            raise InputError(f"there is no speed with {name}={size}: give at least 1")
    for model in models:
        _seconds(model, prompt_tokens, 1, batch_size)  # a warm-up, for which one step of decoding is enough
    rounds: list[list[tuple[float, float]]] = []

    def ends() -> bool:
        return _narrow(rounds) or _sum(rounds) >= seconds

    while len(rounds) < (repeats or _MOST):
        rounds.append([_seconds(model, prompt_tokens, new_tokens, batch_size) for model in models])
        if repeats is None and len(rounds) >= _LEAST and (ends() if agreed is None else agreed(ends)):
            break
    tokens = {"prefill": batch_size * prompt_tokens, "decode": batch_size * new_tokens}
    return [_rates(tokens, taken) | {"speed_repeats": len(rounds)} for taken in zip(*rounds, strict=True)]


def median_interval(values: Sequence[float]) -> list[float]:
    """[low, high], two of the values: by the binomial distribution their median lies between them in 95 % of cases.

    Of fewer than six values these are the least and the most, which cover less: 75 % with three, 94 % with five.
    """
    ordered, count = sorted(values), len(values)
    outside = list(itertools.accumulate(math.comb(count, below) / 2 ** (count - 1) for below in range(count)))
    left_out = max((below + 1 for below in range(count // 2) if outside[below] <= 1 - COVERAGE), default=1) - 1
    return [ordered[left_out], ordered[count - 1 - left_out]]


def _rates(tokens: dict[str, int], taken: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The figures of one model from its (seconds of prefill, of decoding) in each round."""
    found: dict[str, Any] = {}
    for (kind, count), seconds in zip(tokens.items(), zip(*taken, strict=True), strict=True):
        name, (low, high) = f"{kind}_tokens_per_second", median_interval(seconds)
        found |= {name: count / statistics.median(seconds), f"{name}_interval": [count / high, count / low]}
    return found


def _narrow(rounds: list[list[tuple[float, float]]]) -> bool:
    """Whether the median seconds of every model, of prefill and of decoding, are known well enough."""
    series = (seconds for taken in zip(*rounds, strict=True) for seconds in zip(*taken, strict=True))
    return all((high - low) <= _NARROW * statistics.median(s) for s in series for low, high in [median_interval(s)])


def _sum(rounds: list[list[tuple[float, float]]]) -> float:
    return sum(sum(pair) for taken in rounds for pair in taken)


def _seconds(model: CausalLM, prompt_tokens: int, new_tokens: int, batch_size: int) -> tuple[float, float]:
    """(seconds of one prefill, seconds of the new tokens after the first)."""
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens + 1, min_new_tokens=new_tokens + 1, pad_token_id=0
    )
    with inference(model) as device:
        # Token values do not affect time; small ids exist in any vocabulary.
        prompt = (torch.arange(prompt_tokens, device=device) % 16).repeat(batch_size, 1)
        start = _now(device)
        read = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        prefill = _now(device) - start
        begun = torch.cat([prompt, read.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        clock = _TokenClock(device)
        cast(GenerationMixin, model).generate(
            input_ids=begun, attention_mask=torch.ones_like(begun), past_key_values=read.past_key_values,
            generation_config=greedy, streamer=clock,
        )  # fmt: skip
    # Readings: the prompt's echo, then one per decode step, of which the first is not counted.
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
