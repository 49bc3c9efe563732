"""What the rest of the project needs to know of a model family, and the table of families."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from atp.errors import InputError


class UnsupportedModel(InputError):
    """The model cannot be pruned, or not in the space that was asked for."""


@dataclass(frozen=True)
class Linear:
    """Shape of one prunable linear of a decoder layer."""

    out_features: int
    in_features: int
    bias: bool


class Family:
    """Llama and Mistral: seven linears per layer, two norms, x + block(norm(x)). Other families override what differs.

    name: `model_type` of the transformers config.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def linears(self, config: PretrainedConfig) -> dict[str, Linear]:
        """The prunable linears of a decoder layer by their names in it, e.g. `self_attn.q_proj`."""
        hidden, inner = config.hidden_size, config.intermediate_size
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        attention_bias, mlp_bias = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
        return {
            "self_attn.q_proj": Linear(heads * head_dim, hidden, attention_bias),
            "self_attn.k_proj": Linear(kv_heads * head_dim, hidden, attention_bias),
            "self_attn.v_proj": Linear(kv_heads * head_dim, hidden, attention_bias),
            "self_attn.o_proj": Linear(hidden, heads * head_dim, attention_bias),
            "mlp.gate_proj": Linear(inner, hidden, mlp_bias),
            "mlp.up_proj": Linear(inner, hidden, mlp_bias),
            "mlp.down_proj": Linear(hidden, inner, mlp_bias),
        }

    def norm_params(self, config: PretrainedConfig) -> int:
        """Parameters of a decoder layer that no space removes: those of its norms."""
        return 2 * config.hidden_size

    def refuses(self, config: PretrainedConfig, space: str) -> str | None:
        """Why a cut in this space would change what the model computes; None where the cut is exact."""
        return None


_FAMILIES = {name: Family(name) for name in ("llama", "mistral")}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a transformers config. Raises `UnsupportedModel` with the remedy."""
    if config.model_type not in _FAMILIES:
        raise UnsupportedModel(
            f"model family '{config.model_type}' is not supported: use one of {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[config.model_type]
