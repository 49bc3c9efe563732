"""Budgets in the units that people have: a number of parameters or a size on disk, as a share of the decoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from transformers import PretrainedConfig

from atp.config import ATPConfig, DecisionsConfig
from atp.data import load_recipe
from atp.decide.budget import Budget
from atp.ground.errors import InputError
from atp.inputs.loading import data_settings, load_shapes, load_tokenizer, vocabulary_of, weights_dtype
from atp.spaces.space import MaskSpace
from atp.vocabulary.vocabulary import word_parameters

TIMED = ("target_prefill_ms", "target_decode_ms")
WORTH = 0.15
"""Bits per byte: a decoder of which a share k is kept loses about WORTH (1 / k - 1) once it is tuned.

SmolLM2-135M on abstracts, 400 steps (experiments/results/quality.csv): 0.89 whole, 1.01 at 0.6, 1.14 at 0.4.
"""


def share_of(config: ATPConfig, shapes: PretrainedConfig | None = None) -> float:
    """The share of the decoder that a target in shares, parameters or megabytes comes to, in (0, 1).

    shapes: the model's config, by default read from its config.json. Raises `InputError` for a target that embeddings,
    head and final norm alone exceed, or that the whole model does not reach; and for one in milliseconds, which has to
    be measured (`atp.plan.latency.measured_target`). Words that `vocabulary.keep` removes do not count; under `auto`
    only shapes without them say how many.
    """
    decisions, keep = config.decisions, config.vocabulary.keep
    for key in TIMED:
        if getattr(decisions, key) is not None:
            raise InputError(
                f"decisions.{key} is measured on the device by `atp train`, `atp sweep` and `atp plan` only: give here "
                "decisions.target_keep, the share that `atp plan` says it comes to"
            )
    if decisions.target_params is None and decisions.target_megabytes is None:
        return decisions.target_keep
    key = "target_megabytes" if decisions.target_params is None else "target_params"
    if shapes is None and keep == "auto":
        raise InputError(
            f"decisions.{key} counts the words that vocabulary.keep=auto leaves, which only `atp train` and `atp plan` "
            "know once they have read the data: set vocabulary.keep to a number or to null, or give "
            "decisions.target_keep"
        )
    shapes = with_words(load_shapes(config.model), keep) if shapes is None else shapes
    value, unit = _size(config, shapes)
    share, (least, most) = share_of_total(value / unit, shapes, decisions.space)
    if not 0 < share < 1:
        whole, fixed = _number(most * unit), _number(least * unit)
        raise InputError(
            f"decisions.{key} is {_number(value)}, but the model has {whole} and {fixed} of it are not in the decoder, "
            "where structures are removed: choose a number between"
        )
    return share


def _size(config: ATPConfig, shapes: PretrainedConfig) -> tuple[float, float]:
    """A target in parameters or megabytes, and what a parameter takes of it."""
    if config.decisions.target_params is not None:
        return float(config.decisions.target_params), 1.0
    return config.decisions.target_megabytes or 0.0, weights_dtype(config.model, shapes).itemsize / 1e6


def worth_of_words(config: ATPConfig, shapes: PretrainedConfig) -> Callable[[int], float]:
    """What `vocabulary.keep: auto` weighs words by: the worth of a word's parameters in the decoder, in bits per byte.

    As a function of the words that stay: under a target in parameters or megabytes more words leave less to the
    decoder, where each parameter is then worth more, by the derivative of the loss at `WORTH`. Under other targets the
    decoder keeps decisions.target_keep; milliseconds are measured once the words are known. shapes: of the whole model.
    """
    decisions, words, each = config.decisions, int(shapes.vocab_size), word_parameters(shapes)
    (_, (outside, whole)) = share_of_total(0.0, shapes, decisions.space)
    decoder, params = whole - outside, None
    if decisions.target_params is not None or decisions.target_megabytes is not None:
        value, unit = _size(config, shapes)
        params = value / unit

    def worth(kept: int) -> float:
        share = decisions.target_keep
        if params is not None:
            share = min((params - outside + each * (words - kept)) / decoder, 1.0)
        return WORTH * each / decoder / share**2 if share > 0 else math.inf

    return worth


def with_words(shapes: PretrainedConfig, keep: str | int | None) -> PretrainedConfig:
    """The config with the number of words that `vocabulary.keep` names; as it is where that is none.

    Raises `InputError` for more words than the model has.
    """
    if not isinstance(keep, int):
        return shapes
    if keep > shapes.vocab_size:
        raise InputError(
            f"vocabulary.keep is {keep}, but the model's embedding has {shapes.vocab_size} rows: choose a smaller "
            "number"
        )
    shapes = copy.deepcopy(shapes)
    shapes.vocab_size = keep
    if shapes.pad_token_id is not None and shapes.pad_token_id >= keep:
        shapes.pad_token_id = None  # nobody knows its new id yet
    return shapes


def in_shares(config: ATPConfig) -> ATPConfig:
    """The config that several runs are made from: its target as a share, of what the words that stay leave.

    Reads the data where words are chosen by them. Raises `InputError` as `share_of` does, and for a length that is not
    in steps.
    """
    config.training.require_steps()
    decisions, shapes = config.decisions, None
    if config.vocabulary.keep == "auto" and (decisions.target_params or decisions.target_megabytes):
        tokenizer = load_tokenizer(config.model)
        words = vocabulary_of(config, tokenizer, load_recipe(data_settings(config, tokenizer)))
        shapes = None if words is None else words.shapes(load_shapes(config.model))
    return at_share(config, share_of(config, shapes))


def at_share(config: ATPConfig, share: float) -> ATPConfig:
    """The config with decisions.target_keep set to `share`, in (0, 1), in place of any other target."""
    return at_target(config, "target_keep", share)


def at_target(config: ATPConfig, key: str, value: float) -> ATPConfig:
    """The config with one target, `decisions.KEY`, in place of any other."""
    others = {name: known for name, known in config.decisions.model_dump().items() if not name.startswith("target_")}
    return config.model_copy(update={"decisions": DecisionsConfig.model_validate(others | {key: value})})


def share_of_total(params: float, shapes: PretrainedConfig, space: str) -> tuple[float, tuple[int, int]]:
    """The share of the decoder to keep for a model of `params` parameters in all: (share, (least, most)).

    most: parameters of the whole model, tied ones once; least: those outside the decoder's layers.
    """
    from transformers import AutoModelForCausalLM  # seconds, which other targets do not take

    with torch.device("meta"):  # counts without memory
        total = sum(p.numel() for p in AutoModelForCausalLM.from_config(shapes).parameters())
    decoder = Budget(MaskSpace.from_config(shapes, space)).total
    return (params - (total - decoder)) / decoder, (total - decoder, total)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
