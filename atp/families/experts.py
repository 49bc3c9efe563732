"""Families whose MLPs are experts behind a router: each token goes to a few of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from atp.families.family import Family, Linear, declared

EXPERTS = "mlp.experts"
"""The stacked weights of a layer's experts, by their name in it."""


@dataclass(frozen=True, kw_only=True)
class Channels(Linear):
    """The stacked weights of a layer's experts as a linear with a row per channel, those of one expert together.

    A row holds what its channel alone has: its rows of the gate and up projection and its column of the down
    projection. experts: how many there are. interleaved: whether the weights are stored as inputs by outputs, gate and
    up in turns, and not as outputs by inputs, gate before up.
    """

    experts: int
    interleaved: bool

    @property
    def inner(self) -> int:
        """Channels of one expert."""
        return self.out_features // self.experts


@dataclass(frozen=True)
class Routed:
    """How a layer spends its experts. taken: experts per token. inner, hidden: widths of one. biases: its own."""

    experts: int
    taken: int
    inner: int
    hidden: int
    biases: bool = False

    @property
    def weights(self) -> int:
        """Parameters of one expert: gate, up and down projection."""
        return self.inner * self.channel + self.end

    @property
    def channel(self) -> int:
        """Parameters of one channel: its rows of the gate and up projection, and its column of the down projection."""
        return 3 * self.hidden + 2 * self.biases

    @property
    def end(self) -> int:
        """Parameters of one expert that no channel has: the bias of its down projection."""
        return self.hidden * self.biases


@dataclass(frozen=True, kw_only=True)
class ExpertFamily(Family):
    """A family whose every decoder layer has experts.

    inner: the key of the config that is the width of an expert. router: its name in the layer. expert_biases:
    whether it and the experts have biases. interleaved: as in `Channels`.
    """

    inner: str = "intermediate_size"
    space: str = "experts"
    router: str = "mlp.gate"
    expert_biases: bool = False
    interleaved: bool = False

    def routed(self, config: PretrainedConfig) -> Routed:
        """The experts of a decoder layer; config: as for `linears`."""
        found: Any = config
        inner = getattr(found, self.inner)
        return Routed(found.num_experts, found.num_experts_per_tok, inner, found.hidden_size, self.expert_biases)

    def refuses(self, config: PretrainedConfig, space: str) -> str | None:
        dense = _dense_layers(config)
        if dense:
            return f"its layer {dense[0]} has one dense MLP, and every layer must have experts"
        return super().refuses(config, space)

    def linears(self, config: PretrainedConfig) -> dict[str, Linear]:
        routed = self.routed(config)
        attention = {name: shape for name, shape in super().linears(config).items() if name.startswith("self_attn.")}
        return attention | {
            self.router: Linear(routed.experts, routed.hidden, self.expert_biases, lora=False),
            EXPERTS: Linear(routed.experts, routed.weights, False, lora=False),
        }

    def channels(self, config: PretrainedConfig) -> Channels:
        """The experts of a decoder layer by their channels; config: as for `linears`."""
        routed = self.routed(config)
        return Channels(
            routed.experts * routed.inner, routed.channel, False, lora=False,
            experts=routed.experts, interleaved=self.interleaved,
        )  # fmt: skip


def _dense_layers(config: PretrainedConfig) -> list[int]:
    """The layers in which Qwen3-MoE's config asks for a plain MLP."""
    alone, step = declared(config, "mlp_only_layers", None) or [], declared(config, "decoder_sparse_step", 1)
    return [layer for layer in range(config.num_hidden_layers) if layer in alone or (layer + 1) % step]
