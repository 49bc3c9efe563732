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

from atp.models.config import CutConfig

_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # YaRN's own, where a config has none


@dataclass(frozen=True)
class Rope:
    """What is written beside rope_theta.

    keys: methods of `GGUFWriter` with their values. factors: by which frequencies are divided one by one, float32
    [head_dim / 2], by the names of their tensors. remark: what the file's user should know.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    remark: str | None = None

    def add_keys(self, writer: GGUFWriter) -> None:
        """Writes the keys."""
        for name, value in self.keys.items():
            getattr(writer, name)(value)


def rope_of(config: CutConfig) -> Rope | None:
    """How llama.cpp computes the model's angles; None where some pairs of a head are not rotated, which it cannot."""
    parameters = cast(dict[str, Any], config.rope_parameters)
    kind, whole = parameters["rope_type"], LlamaRotaryEmbedding(config.without_layers())
    width = config.head_dim
    plain = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float) / width))
    scale = {} if whole.attention_scaling == 1 else {"add_rope_scaling_attn_factors": whole.attention_scaling}
    if not whole.inv_freq.all():
        return None
    if kind == "default":
        return Rope()
    if kind == "dynamic":
        return Rope(
            remark=f"llama.cpp does not scale RoPE with the length of a text, as type dynamic does beyond "
            f"{config.max_position_embeddings} tokens: up to there it makes no difference"
        )
    if kind == "linear":
        keys = {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": parameters["factor"]}
        return Rope(keys)
    if kind == "longrope":
        original = parameters["original_max_position_embeddings"]
        keys = {"add_rope_scaling_type": RopeScalingType.LONGROPE, "add_rope_scaling_orig_ctx_len": original}
        factors = {f"rope_factors_{end}.weight": torch.tensor(parameters[f"{end}_factor"]) for end in ("long", "short")}
        return Rope(
            keys | scale, factors,
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
        if factor > 0 and torch.allclose(_yarn(plain, parameters["rope_theta"], keys), whole.inv_freq, rtol=1e-5):
            return Rope(keys)
    return Rope(scale, {"rope_freqs.weight": plain / whole.inv_freq})


def _yarn(plain: Tensor, theta: float, keys: Mapping[str, Any]) -> Tensor:
    """The frequencies that llama.cpp makes of those without scaling, which knows no `truncate: false`."""
    pairs, original = len(plain), keys["add_rope_scaling_orig_ctx_len"]

    def turning(times: float) -> float:
        return pairs * math.log(original / (times * 2 * math.pi)) / math.log(theta)

    low = max(0, math.floor(turning(keys["add_rope_scaling_yarn_beta_fast"])))
    high = min(2 * pairs - 1, math.ceil(turning(keys["add_rope_scaling_yarn_beta_slow"])))
    scaled = ((torch.arange(pairs) - low) / max(0.001, high - low)).clamp(0, 1)
    return plain / keys["add_rope_scaling_factor"] * scaled + plain * (1 - scaled)
