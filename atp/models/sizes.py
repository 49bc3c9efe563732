"""Whether the sizes in a config.json make a model, before any class is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from atp.errors import InputError, shorten

_FAMILIES = ("llama", "mistral", "atp_llama")
_REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_OPTIONAL = ("num_key_value_heads", "head_dim")  # null stands for what follows from the others
_LARGEST = {"num_hidden_layers": 2**12, "max_position_embeddings": 2**31}  # beyond every model there is
_LARGEST_WIDTH = 2**24
_MANY = 2**28  # weights for which there may be no room; fewer are built, and missed one by one


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuses sizes of a Llama-like config.json that are no counts or do not divide each other.

    config: the file's content. Keys that it leaves out have transformers' defaults; other families are left to
    transformers. Raises `InputError` naming the key and its value.
    """
    if config.get("model_type") not in _FAMILIES:
        return
    given = {key: config[key] for key in _REQUIRED if key in config}
    given |= {key: config[key] for key in _OPTIONAL if config.get(key) is not None}
    for key, value in given.items():
        if type(value) is not int or value < 1:
            _refuse(key, value, "make it a whole number of at least 1")
        if value > (largest := _LARGEST.get(key, _LARGEST_WIDTH)):
            _refuse(key, value, f"make it at most {largest}")
    heads = given.get("num_attention_heads")
    kv_heads, hidden, head_dim = (given.get(key) for key in ("num_key_value_heads", "hidden_size", "head_dim"))
    if heads and kv_heads and heads % kv_heads:
        _refuse("num_attention_heads", heads, f"make it a multiple of num_key_value_heads {kv_heads}")
    # SliceGPT narrows the residual stream of a cut model alone, so there it need not divide.
    if heads and hidden and config["model_type"] != "atp_llama":
        if hidden % heads:
            _refuse("hidden_size", hidden, f"make it a multiple of num_attention_heads {heads}")
        head_dim = head_dim or hidden // heads
    if head_dim and head_dim % 2:
        _refuse("head_dim", head_dim, "make it even, because RoPE rotates pairs")


def check_against_files(config: PretrainedConfig, size: int) -> None:
    """Refuses a Llama-like config that describes far more weights than its files can hold.

    Otherwise transformers would first make room for them all. size: bytes of all files. Raises `InputError`.
    """
    if config.model_type not in _FAMILIES:
        return
    weights = config.vocab_size * config.hidden_size
    if config.model_type != "atp_llama":  # whose layers may be much narrower
        attention = config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
        weights += config.num_hidden_layers * config.hidden_size * (2 * attention + 3 * config.intermediate_size)
    if weights > _MANY and weights > 8 * size:  # no file has less than a bit for a weight
        raise InputError(
            f"config.json of the model describes {weights:,} weights and its files hold {size:,} bytes: correct "
            "config.json, or fetch the model again"
        )


def _refuse(key: str, value: object, remedy: str) -> None:
    raise InputError(f"config.json of the model: {key} is {shorten(repr(value))}: {remedy}")
