"""RoPE in a GGUF file: the keys and tensors by which llama.cpp scales its angles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from atp.families import family_of
from atp.models.config import CutConfig

_STILL = 1e30  # a factor by which an angle is zero at every position
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # YaRN's own, where a config has none


@dataclass(frozen=True)
class Rope:
    """What is written beside rope_theta.

    keys: methods of `GGUFWriter` with their values. factors: by which frequencies are divided one by one, float32
    [head_dim / 2], by the names of their tensors. still: what rows that are not rotated are multiplied by, because
    llama.cpp multiplies all rows by the scale of cosines. remark: what the file's user should know.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    still: float = 1.0
    remark: str | None = None

    def add_keys(self, writer: GGUFWriter) -> None:
        """Writes the keys."""
        for name, value in self.keys.items():
            getattr(writer, name)(value)


def rope_of(config: CutConfig) -> Rope:
    """How llama.cpp computes the model's angles, where pairs that are not rotated come last in a head."""
    parameters = cast(dict[str, Any], config.rope_parameters)
    embedding = Phi3RotaryEmbedding if family_of(config).partial else LlamaRotaryEmbedding
    kind, whole = parameters["rope_type"], embedding(config.without_layers())
    width = config.head_dim
    plain = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float) / width))
    scale = {} if whole.attention_scaling == 1 else {"add_rope_scaling_attn_factors": whole.attention_scaling}
    in_part = len(whole.inv_freq) < len(plain)
    still = in_part or not whole.inv_freq.all()
    if kind == "default" and not still:
        return Rope()
    factors, rows = {"rope_freqs.weight": _factors(plain, whole.inv_freq)}, 1.0
    if in_part:
        rows = 1 / whole.attention_scaling
    if kind == "dynamic":
        return Rope(
            factors=factors if still else {},
            remark=f"llama.cpp does not scale RoPE with the length of a text, as type dynamic does beyond "
            f"{config.max_position_embeddings} tokens: up to there it makes no difference",
        )
    if kind == "linear" and not still:
        keys = {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": parameters["factor"]}
        return Rope(keys)
    if kind == "longrope":
        original = parameters["original_max_position_embeddings"]
        keys = {"add_rope_scaling_type": RopeScalingType.LONGROPE, "add_rope_scaling_orig_ctx_len": original}
        pairs = len(whole.inv_freq)
        own = plain if pairs == len(plain) else parameters["rope_theta"] ** (-torch.arange(pairs) / pairs)
        by_length = {
            f"rope_factors_{end}.weight": _factors(plain, own / torch.tensor(parameters[f"{end}_factor"]))
            for end in ("long", "short")
        }
        return Rope(
            keys | scale, by_length, rows,
            f"llama.cpp takes the long factors of RoPE where it is started with a context of more than {original} "
            "tokens, and transformers where the text is longer: give llama.cpp the context that the text needs",
        )  # fmt: skip
    if kind == "yarn":
        factor = parameters["factor"] or config.max_position_embeddings / parameters["original_max_position_embeddings"]
        keys = {
            "add_rope_scaling_type": RopeScalingType.YARN,
            "add_rope_scaling_factor": factor,
            "add_rope_scaling_orig_ctx_len": parameters["original_max_position_embeddings"],
            "add_rope_scaling_yarn_beta_fast": parameters.get("beta_fast") or _BETA_FAST,
            "add_rope_scaling_yarn_beta_slow": parameters.get("beta_slow") or _BETA_SLOW,
            # llama.cpp multiplies it by what the paper says.
            "add_rope_scaling_attn_factors": whole.attention_scaling / (1 + 0.1 * math.log(max(factor, 1))),
        }
        found = None if still or factor <= 0 else _yarn(plain, parameters["rope_theta"], keys)
        if found is not None and torch.allclose(found, whole.inv_freq, rtol=1e-5):
            return Rope(keys)
    return Rope(scale, factors, rows)


def _factors(plain: Tensor, wanted: Tensor) -> Tensor:
    """What llama.cpp divides plain frequencies by to have the wanted ones, of which missing ones are zero."""
    factors = plain.new_full(plain.shape, _STILL)
    factors[: len(wanted)] = (plain[: len(wanted)] / wanted).clamp_max(_STILL)
    return factors


def _yarn(plain: Tensor, theta: float, keys: Mapping[str, Any]) -> Tensor:
    """The frequencies that llama.cpp makes of those without scaling, which knows no `truncate: false`."""
    pairs, original = len(plain), keys["add_rope_scaling_orig_ctx_len"]

    def turning(times: float) -> float:
        return pairs * math.log(original / (times * 2 * math.pi)) / math.log(theta)

    low = max(0, math.floor(turning(keys["add_rope_scaling_yarn_beta_fast"])))
    high = min(2 * pairs - 1, math.ceil(turning(keys["add_rope_scaling_yarn_beta_slow"])))
    scaled = ((torch.arange(pairs) - low) / max(0.001, high - low)).clamp(0, 1)
    return plain / keys["add_rope_scaling_factor"] * scaled + plain * (1 - scaled)
