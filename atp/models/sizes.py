"""Whether the sizes and the RoPE in a config.json make a model, before any class is built from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from atp.families import FAMILIES, ExpertFamily, family_name, family_of, is_cut, layer_config
from atp.ground.errors import InputError, reason, shorten

_REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_OPTIONAL = ("num_key_value_heads", "head_dim")  # null stands for what follows from the others
_EXPERTS = ("num_experts", "num_local_experts")  # two names of one number
_OF_EXPERTS = (*_EXPERTS, "num_experts_per_tok", "moe_intermediate_size")  # of families that have them
_PER_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size", *_EXPERTS)
_LARGEST = {"num_hidden_layers": 2**12, "max_position_embeddings": 2**31}  # beyond every model there is
_LARGEST_WIDTH = 2**24
_LARGEST_BASE = 1e12  # of RoPE that is taken without a look at its angles
_MANY = 2**28  # weights for which there may be no room; fewer are built, and missed one by one


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuses sizes in a config.json that are no counts or do not divide each other.

    config: the file's content. Keys that it leaves out have transformers' defaults; families that are not supported are
    left to transformers. Raises `InputError` naming the key and its value.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or family_name(name) not in FAMILIES:
        return
    given = {key: config[key] for key in _REQUIRED if key in config}
    given |= {key: config[key] for key in _OPTIONAL if config.get(key) is not None}
    if isinstance(FAMILIES[family_name(name)], ExpertFamily):
        given |= {key: config[key] for key in _OF_EXPERTS if key in config}
    for key, value in given.items():
        if type(value) is not int or value < 1:
            _refuse(key, value, "make it a whole number of at least 1")
        if value > (largest := _LARGEST.get(key, _LARGEST_WIDTH)):
            _refuse(key, value, f"make it at most {largest}")
    for layer, widths in _own_widths(config):
        for key in _PER_LAYER:
            if type(value := widths.get(key)) is int and value > _LARGEST_WIDTH:
                _refuse(f"{key} of layer {layer}", value, f"make it at most {_LARGEST_WIDTH}")
    taken = given.get("num_experts_per_tok", 0)
    for key in _EXPERTS:
        if taken > given.get(key, taken):
            _refuse("num_experts_per_tok", taken, f"make it at most {key} {given[key]}")
    heads = given.get("num_attention_heads")
    kv_heads, hidden, head_dim = (given.get(key) for key in ("num_key_value_heads", "hidden_size", "head_dim"))
    if heads and kv_heads and heads % kv_heads:
        _refuse("num_attention_heads", heads, f"make it a multiple of num_key_value_heads {kv_heads}")
    # SliceGPT narrows the residual stream of a cut model but not its heads, so there it need not divide.
    if heads and hidden and name == family_name(name):
        if hidden % heads and (head_dim is None or FAMILIES[name].whole_heads):
            _refuse("hidden_size", hidden, f"make it a multiple of num_attention_heads {heads}")
        head_dim = head_dim or hidden // heads
    if head_dim and head_dim % 2:
        _refuse("head_dim", head_dim, "make it even, because RoPE rotates pairs")


def check_rope(config: PretrainedConfig) -> None:
    """Refuses RoPE of which no angle for each pair of a head can be computed, on short and on long texts.

    config: what transformers makes of a config.json; families that are not supported are left to it. Raises
    `InputError` naming rope_parameters.
    """
    if family_name(config.model_type) not in FAMILIES:
        return
    family, whole = family_of(config), config.without_layers() if is_cut(config) else config
    parameters: Mapping[str, Any] = whole.rope_parameters
    if not family.ropes_by_type:
        if any(isinstance(value, Mapping) for value in parameters.values()):
            _refuse("rope_parameters", parameters, "give those of one type of RoPE, one for all layers")
        share = parameters.get("partial_rotary_factor", 1.0)
        if family.partial and not (isinstance(share, (int, float)) and 0 < share <= 1):
            _refuse("partial_rotary_factor", share, "make it a share of a head, above 0 and at most 1")
        _check_one_rope(whole, family.rotated(whole) // 2)
        return
    for layer_type in sorted(set(whole.layer_types)):
        one = copy.copy(whole)
        one.rope_parameters = parameters.get(layer_type)
        if not isinstance(one.rope_parameters, Mapping):
            _refuse("rope_parameters", parameters, f"give those of layer type {layer_type}")
        _check_one_rope(one, family.head_dim(whole) // 2)


def _check_one_rope(whole: Any, pairs: int) -> None:
    """As `check_rope`, for a config without widths per layer that has one RoPE; pairs: of a head."""
    if (kind := whole.rope_parameters.get("rope_type")) not in (types := ("default", *ROPE_INIT_FUNCTIONS)):
        _refuse("rope_type in rope_parameters", kind, f"make it one of {', '.join(types)}")
    if kind == "default" and _is_plain(whole.rope_parameters):
        return
    # Seconds, which plain RoPE does not take. Phi-3's is Llama's, of a part of a head where that is asked for.
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    try:
        found = (Phi3RotaryEmbedding if family_of(whole).partial else LlamaRotaryEmbedding)(whole)
        frequencies: list[Any] = [found.inv_freq]
        scales = [found.attention_scaling]
        if kind != "default":
            long, scale = ROPE_INIT_FUNCTIONS[kind](whole, seq_len=2 * whole.max_position_embeddings)
            frequencies.append(long)
            scales.append(scale)
        finite = all(values.isfinite().all() for values in (*frequencies, torch.tensor(scales, dtype=torch.float64)))
    except Exception as error:
        raise InputError(
            f"config.json of the model: RoPE of type {kind} cannot be computed from rope_parameters ({reason(error)}): "
            "correct them"
        ) from error
    if any(len(values) != pairs for values in frequencies):
        counts = " and ".join(dict.fromkeys(str(len(values)) for values in frequencies))
        remedy = f"type {kind} then rotates {counts} of {pairs} pairs of a head, not all: correct it"
        _refuse("rope_parameters", whole.rope_parameters, remedy)
    if not finite:
        _refuse("rope_parameters", whole.rope_parameters, f"angles of type {kind} are then not finite: correct it")


def _is_plain(parameters: Mapping[str, Any]) -> bool:
    """Whether RoPE is a base that its angles are finite for, and nothing else."""
    theta = parameters.get("rope_theta")
    known = parameters.keys() <= {"rope_type", "rope_theta"}
    return known and isinstance(theta, (int, float)) and 1 <= theta < _LARGEST_BASE


def check_against_files(config: PretrainedConfig, size: int, many: int = _MANY) -> None:
    """Refuses a config of a supported family that describes far more weights than its files can hold.

    Otherwise transformers would first make room for them all. size: bytes of all files. many: weights for which
    that matters. Raises `InputError`.
    """
    if family_name(config.model_type) not in FAMILIES:
        return
    weights = config.vocab_size * config.hidden_size
    if not is_cut(config) or config.beyond_whole_heads() is None:  # else its linears may be much narrower
        for layer in range(config.num_hidden_layers):
            linears = family_of(config).linears(layer_config(config, layer)).values()
            weights += sum(linear.out_features * linear.in_features for linear in linears)
    if weights > many and weights > 8 * size:  # no file has less than one bit per weight
        raise InputError(
            f"config.json of the model describes {weights:,} weights and its files hold {size:,} bytes: correct "
            "config.json, or fetch the model again"
        )


def _own_widths(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(layer, its widths) of a config.json whose layers differ, also in the form of earlier versions."""
    by_layer, listed = config.get("per_layer_config"), config.get("layer_shapes")
    found = list(by_layer.items()) if isinstance(by_layer, Mapping) else []
    found += enumerate(listed) if isinstance(listed, list) else []
    return [(str(layer), widths) for layer, widths in found if isinstance(widths, Mapping)]


def _refuse(key: str, value: object, remedy: str) -> None:
    raise InputError(f"config.json of the model: {key} is {shorten(repr(value))}: {remedy}")
