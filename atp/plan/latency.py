"""Budgets in milliseconds: how long a model takes at each width, timed on this device, and the share that meets a time.

A table holds the time of one layer's attention and MLP at several widths, of its norms, and of all that is outside the
layers. A model whose layers all keep the same share of every structure takes their sum; the exact fit then meets that
model's share of the decoder with widths that differ between layers (docs/plan.md).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from atp.config import ATPConfig
from atp.decide.budget import Budget
from atp.evaluation.inference import cache_name, inference
from atp.families import layer_config
from atp.ground import progress
from atp.ground.environment import device_name
from atp.ground.errors import InputError
from atp.inputs.loading import check_prunable, load_shapes, weights_dtype
from atp.inputs.targets import TIMED, with_words
from atp.processes import processes
from atp.removal import cut_config
from atp.spaces.space import MaskSpace, Structure

PROMPT = 256  # tokens, as in the speed of a run's summary
_POINTS = 8  # widths that are timed: eighths of the whole
_PREFILLS, _DECODES = 5, 32  # passes that a median is of, after one that warms up
_WORDS = 16  # the vocabulary of the models whose head is not timed
_HALVINGS = 50
_PER_LAYER = ("layer_types", "no_rope_layers")  # lists in a config with an entry per layer


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one pass.

    attention, mlp: (share kept of the block's structures, milliseconds in one layer), both rising: a wider block counts
    as at least as slow as a narrower one. norms: what else a layer takes. outside: embedding, final norm, head and the
    call itself.
    """

    attention: tuple[tuple[float, float], ...]
    mlp: tuple[tuple[float, float], ...]
    norms: float
    outside: float
    layers: int

    def ms(self, kept: float) -> float:
        """Of a model whose layers all keep this share of every structure, in [1/8, 1]; linear between widths timed."""
        return self.layers * (_at(self.attention, kept) + _at(self.mlp, kept) + self.norms) + self.outside

    def kept(self, ms: float) -> float:
        """The largest share of every structure whose time is within `ms`, which lies between the ends of the table."""
        low, high = 1 / _POINTS, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.ms(middle) <= ms else (low, middle)
        return low


def measured_target(
    config: ATPConfig, tables: dict[str, LatencyTable] | None = None, shapes: PretrainedConfig | None = None
) -> dict[str, Any] | None:
    """What a target in milliseconds comes to: {target, target_keep, description, device, table}; None without one.

    tables: measured before, by key of the target; what is measured is added, so that several targets come from one
    measurement. shapes: the model's config, by default its own with the number of words of `vocabulary.keep`. Raises
    `InputError` for a time that the smallest table entry exceeds or that the whole model meets, and
    for a model whose layers differ in width.
    """
    asked = {key: value for key in TIMED if (value := getattr(config.decisions, key)) is not None}
    if not asked:
        return None
    ((key, ms),) = asked.items()
    shapes = with_words(load_shapes(config.model), config.vocabulary.keep) if shapes is None else shapes
    check_prunable(config.model, shapes, config.decisions.space)
    space = MaskSpace.from_config(shapes, config.decisions.space)
    if len(space.adapted) < len(space.modules):
        raise InputError(
            f"decisions.{key} times linears by their widths, and what experts take goes by the tokens that they get: "
            "use target_keep"
        )
    if not space.equal_layers:
        raise InputError(
            f"decisions.{key} times one layer for all, but those of this model differ in width: use target_keep"
        )
    decode = key == "target_decode_ms"
    tables = {} if tables is None else tables
    if key not in tables:
        progress.begin("timing a layer")
        tables[key] = measure(shapes, config.decisions.space, weights_dtype(config.model, shapes), decode=decode)
    table = tables[key]
    least, most = table.ms(1 / _POINTS), table.ms(1.0)
    what = "a new token" if decode else f"a prompt of {PROMPT} tokens"
    if ms >= most:
        raise InputError(
            f"decisions.{key} is {ms:g}, but the whole model takes {most:.4g} ms for {what} on this device: nothing "
            "needs to be cut for that, choose a smaller number"
        )
    if ms < least:
        raise InputError(
            f"decisions.{key} is {ms:g}, but a model that keeps an eighth of every width takes {least:.4g} ms for "
            f"{what} on this device: choose a larger number, below the whole model's {most:.4g} ms"
        )
    kept = table.kept(ms)
    share = share_of_widths(kept, space)
    return {
        "target": asked,
        "target_keep": share,
        "description": f"{what} takes {most:.4g} ms on this device before the cut, and {table.ms(kept):.4g} ms with "
        f"{share:.3f} of the decoder and the same widths in all layers",
        "device": device_name(),
        "table": asdict(table),
    }


def share_of_widths(kept: float, space: MaskSpace) -> float:
    """The share of decoder parameters when all layers keep this share of every structure, of each at least one."""
    budget = Budget(space)
    counts = torch.tensor([max(kept * structure.size, 1.0) for structure in space.structures], dtype=torch.float64)
    return float(budget.parameters(counts)) / budget.total


def measure(config: PretrainedConfig, space: str, dtype: torch.dtype, *, decode: bool) -> LatencyTable:
    """Times one layer with random weights at eight widths, on this process's device: one prompt, or one new token."""
    layers = MaskSpace.from_config(config, space).num_layers
    attention: dict[float, list[float]] = {}
    mlp: dict[float, list[float]] = {}
    norms, outside = [], 0.0
    for point in range(1, _POINTS + 1):
        whole = point == _POINTS  # the one whose head is timed too
        shapes = one_layer(config, None if whole else _WORDS)
        own = MaskSpace.from_config(shapes, space)
        counts = {s.name: max(round(point / _POINTS * s.size / s.groups), 1) * s.groups for s in own.structures}
        with torch.device(processes.device()):
            model = AutoModelForCausalLM.from_config(cut_config(shapes, own, _first(own, counts)), dtype=dtype)
        found = _times(model, decode=decode)
        for block, table in (("self_attn.", attention), ("mlp.", mlp)):
            table.setdefault(_kept(own, counts, block), []).append(found[block])
        norms.append(found["norms"])
        outside = found["outside"]
    return LatencyTable(_rising(attention), _rising(mlp), statistics.median(norms), outside, layers)


def one_layer(config: PretrainedConfig, words: int | None = None, times: int = 1) -> PretrainedConfig:
    """The config of a model with one such layer, the first where layers differ.

    words: its vocabulary, where a head of the real size is not wanted. times: how often it has that layer.
    """
    values = layer_config(config, 0).to_dict()
    values.pop("skip", None)  # transformers' note on a layer, which is no key of a config
    values |= {key: values[key][:1] * times for key in _PER_LAYER if isinstance(values.get(key), list)}
    values |= {"num_hidden_layers": times, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    return type(config).from_dict(values | ({} if words is None else {"vocab_size": words}))


def now(device: torch.device) -> float:
    """The time in seconds at which the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _times(model: Any, *, decode: bool) -> dict[str, float]:
    """Median milliseconds of a pass of a model of one layer, by part: both blocks, norms, and outside the layer."""
    layer, marks = model.get_decoder().layers[0], []
    taken: dict[str, list[float]] = {"self_attn.": [], "mlp.": [], "norms": [], "outside": []}
    cached = cache_name(model)
    with inference(model) as device:

        def mark(*_: object) -> None:
            marks.append(now(device))

        for part in (layer, layer.self_attn, layer.mlp):
            part.register_forward_pre_hook(mark)
            part.register_forward_hook(mark)

        def one_pass(tokens: Tensor, cache: Any = None) -> Any:
            marks.clear()
            mark()
            out = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cached: cache})
            mark()
            start, enters, *blocks, leaves, end = marks
            attention, mlp = blocks[1] - blocks[0], blocks[3] - blocks[2]
            inside = leaves - enters
            parts = (attention, mlp, inside - attention - mlp, end - start - inside)
            for spent, seconds in zip(taken.values(), parts, strict=True):
                spent.append(1000 * seconds)
            return getattr(out, cached)

        prompt = (torch.arange(PROMPT, device=device) % _WORDS)[None]
        cache = one_pass(prompt)
        if decode:
            for spent in taken.values():
                spent.clear()
        for _ in range(1 + _DECODES if decode else _PREFILLS):
            cache = one_pass(prompt[:, :1], cache) if decode else one_pass(prompt)
    return {part: statistics.median(spent[1:]) for part, spent in taken.items()}


def _first(space: MaskSpace, counts: Mapping[str, int]) -> Tensor:
    """A mask bool [space.size] that keeps the first `counts` decisions of each structure."""
    mask = torch.zeros(space.size, dtype=torch.bool)
    for structure in space.structures:
        mask[structure.start + structure.first(counts[structure.name])] = True
    return mask


def _kept(space: MaskSpace, counts: Mapping[str, int], block: str) -> float:
    """The mean share kept of the structures that cut a block."""

    def cuts(structure: Structure) -> bool:
        return any(cut.module.startswith(block) for cut in structure.cuts)

    return statistics.fmean(counts[s.name] / s.size for s in space.structures if cuts(s))


def _at(points: Sequence[tuple[float, float]], kept: float) -> float:
    return float(np.interp(kept, [share for share, _ in points], [ms for _, ms in points]))


def _rising(found: Mapping[float, list[float]]) -> tuple[tuple[float, float], ...]:
    shares = sorted(found)
    times = np.maximum.accumulate([statistics.median(found[share]) for share in shares])
    return tuple(zip(shares, map(float, times), strict=True))
