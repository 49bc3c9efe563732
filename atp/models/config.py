"""Config of a Llama or Mistral model whose layers differ in width."""

from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer.

    qk_pairs: kept RoPE pairs in rising order, as positions in [0, head_dim / 2); None keeps all of them. Each pair is
    two rows of every query and key head. v_head_dim: width of a value head; intermediate_size: width of the MLP.
    """

    num_attention_heads: int
    num_key_value_heads: int
    qk_pairs: list[int] | None
    v_head_dim: int
    intermediate_size: int

    def qk_head_dim(self, head_dim: int) -> int:
        """Width of a query or key head, for the head_dim of the model before any cut."""
        return head_dim if self.qk_pairs is None else 2 * len(self.qk_pairs)


@strict
class ATPLlamaConfig(LlamaConfig):
    """`LlamaConfig` plus the widths of every layer, for cut Llama and Mistral models.

    layer_shapes: one `LayerShape` a layer as a dict, None for a model without cuts. The inherited head counts, head_dim
    and intermediate_size stay those of the model before the cut: head_dim sets the RoPE frequencies and the softmax
    scale. sliding_window: as in `MistralConfig`, None for full attention. shortcuts: a matrix on each residual
    connection, as SliceGPT needs; hidden_size is then the width that is left of the residual stream.
    """

    model_type = "atp_llama"
    # TRL reads it of every class that transformers does not bring along. Empty rather than None, which transformers
    # searches; no field, so that config.json has it only where there is something in it.
    auto_map = MappingProxyType({})

    layer_shapes: list[dict[str, Any]] | None = None
    sliding_window: int | None = None
    shortcuts: bool = False

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.layer_shapes is None:
            full = LayerShape(
                self.num_attention_heads, self.num_key_value_heads, None, self.head_dim, self.intermediate_size
            )
            self.layer_shapes = [asdict(full) for _ in range(self.num_hidden_layers)]

    def layer_shape(self, layer: int) -> LayerShape:
        """Widths of one layer."""
        return LayerShape(**self.layer_shapes[layer])

    def validate_architecture(self) -> None:
        """Checks every layer's widths; called by transformers. Raises ValueError naming layer and key."""
        if len(self.layer_shapes) != self.num_hidden_layers:
            raise ValueError(
                f"layer_shapes describes {len(self.layer_shapes)} layers and num_hidden_layers is "
                f"{self.num_hidden_layers}: give one entry a layer"
            )
        for layer in range(self.num_hidden_layers):
            try:
                shape = self.layer_shape(layer)
            except TypeError as error:
                raise ValueError(f"layer_shapes[{layer}] must hold exactly the keys of LayerShape: {error}") from None
            for key, problem in self._problems(shape):
                raise ValueError(f"layer_shapes[{layer}].{key} is {getattr(shape, key)}: {problem}")

    def _problems(self, shape: LayerShape):
        for key in ("num_key_value_heads", "num_attention_heads", "v_head_dim", "intermediate_size"):
            if getattr(shape, key) < 1:
                yield key, "a layer keeps at least one"
        if shape.num_key_value_heads > 0 and shape.num_attention_heads % shape.num_key_value_heads:
            yield "num_attention_heads", f"it must be a multiple of the {shape.num_key_value_heads} key-value heads"
        pairs = shape.qk_pairs
        if pairs is not None:
            if not pairs:
                yield "qk_pairs", "a layer keeps at least one"
            elif pairs != sorted(set(pairs)) or pairs[0] < 0 or pairs[-1] >= self.head_dim // 2:
                yield "qk_pairs", f"pairs are distinct, rising and below head_dim / 2 = {self.head_dim // 2}"
