"""The loss of one batch, for every kind of step: decision, LoRA before and after the cut, dense baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from atp.families import FAMILIES, Windows, family_name, family_of
from atp.models.attention import NAME, training_masks
from atp.sharding.shards import whole
from atp.training.cross_entropy import linear_cross_entropy
from atp.training.profiling import scope

Decode = Callable[[Any, dict[str, Any]], Tensor]
"""(decoder, its keywords) -> its last hidden state [batch, tokens, hidden]."""


def causal_lm_loss(
    model: nn.Module,
    batch: dict[str, Any],
    count: Tensor | int | None = None,
    *,
    decode: Decode | None = None,
) -> Tensor:
    """Mean cross-entropy over the scored tokens of a batch that `atp.data.collate` made, scalar float32.

    model: a causal LM, also inside PEFT or a distributed wrapper. count: divisor of the sum over tokens, for steps of
    several batches; default the scored tokens of this batch. Positions without a label cost nothing, but in a model
    of an unknown family, which computes all its logits. decode: what calls the decoder.
    """
    if family_name(causal_of(model).config.model_type) not in FAMILIES:
        return _plain_loss(model, batch) / (len(batch["targets"]) if count is None else count)
    scored, head = head_inputs(model, batch, decode)
    with scope("loss"):
        total = linear_cross_entropy(scored, head, batch["targets"], cap=logits_cap(model))
        return total / (len(batch["targets"]) if count is None else count)


def _plain_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The sum over scored tokens by the model's own logits, whatever they are computed from."""
    given = {key: batch[key] for key in ("input_ids", "position_ids") if batch.get(key) is not None}
    logits = model(**given, use_cache=False).logits.flatten(0, 1).index_select(0, batch["scored"])
    return functional.cross_entropy(logits.float(), batch["targets"], reduction="sum")


def head_inputs(model: nn.Module, batch: dict[str, Any], decode: Decode | None = None) -> tuple[Tensor, Tensor]:
    """What the logits of the scored tokens are the product of: states [scored, hidden], head [vocab, hidden]."""
    causal = causal_of(model)
    family = family_of(causal.config)
    hidden = _final_hidden(model, causal, batch, family.windows(causal.config), decode)
    with scope("loss"):
        scored = hidden.flatten(0, 1).index_select(0, batch["scored"])
        divisor = family.logits_divisor(causal.config)
        if divisor != 1:
            scored = scored / divisor  # the same as dividing the logits, of which there are many more
        return scored, whole(causal.get_output_embeddings().weight)


def logits_cap(model: nn.Module) -> float | None:
    """c where these products z become logits c * tanh(z / c), else None."""
    config = causal_of(model).config
    return family_of(config).logits_cap(config)


def causal_of(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, which may be inside PEFT or a distributed wrapper."""
    inner = getattr(model, "module", model)  # DistributedDataParallel
    return cast(PreTrainedModel, inner.get_base_model() if isinstance(inner, PeftModel) else inner)


def _final_hidden(
    model: nn.Module, causal: PreTrainedModel, batch: dict[str, Any], windows: Windows, decode: Decode | None
) -> Tensor:
    """The input of the head, [batch, tokens, hidden]. The pass goes through distributed wrappers, which rely on it."""
    input_ids, position_ids = batch["input_ids"], batch.get("position_ids")
    mask = None
    if causal.config._attn_implementation == NAME:
        mask = training_masks(input_ids, position_ids, windows)
    if not isinstance(getattr(model, "module", None), nn.Module):
        # Even without a token to score, the head would be cast under autocast, or gathered from its shards.
        with scope("other"):
            decoder: Any = causal.get_decoder()
            given = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids, "use_cache": False}
            return decode(decoder, given) if decode else decoder(**given).last_hidden_state
    caught: list[Tensor] = []
    handle = causal.get_decoder().register_forward_hook(lambda *call: caught.append(call[-1].last_hidden_state))
    try:
        with scope("other"):
            model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=input_ids.new_empty(0),
            )
    finally:
        handle.remove()
    return caught[0]
