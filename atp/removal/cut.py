"""The cut: removed rows and columns leave the weights and the LoRA factors for good."""

from __future__ import annotations

import copy
import re

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from atp.errors import InputError
from atp.masks.space import MaskSpace
from atp.models import ATPLlamaConfig, ATPLlamaForCausalLM
from atp_kernels import compact

_LINEAR = re.compile(r"(?:^|\.)layers\.(\d+)\.((?:self_attn|mlp)\.\w+_proj)\.(.+)$")
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
    "head_dim",
)  # fmt: skip


def cut_config(config: PretrainedConfig, space: MaskSpace, mask: Tensor) -> ATPLlamaConfig:
    """The config of the cut model. mask: bool [space.size]. Raises `InputError` where the cut would not be exact."""
    if getattr(config, "sliding_window", None) is not None:
        raise InputError(
            f"the model uses sliding_window {config.sliding_window}, which the cut model does not: set it to null in "
            "the source's config.json if your texts are shorter than the window"
        )
    widths = []
    for layer, kept in enumerate(space.kept_indices(mask)):
        empty = [name for name, indices in kept.items() if not indices]
        if empty:
            raise ValueError(f"layer {layer} would lose all of '{empty[0]}': keep at least one decision of each")
        widths.append(
            {
                "kv_heads": len(kept["kv_group"]) if "kv_group" in kept else config.num_key_value_heads,
                "qk_pairs": kept.get("qk"),
                "v_head_dim": len(kept["vo"]) if "vo" in kept else config.head_dim,
                "intermediate_size": len(kept["mlp"]),
            }
        )
    return ATPLlamaConfig(
        **{name: copy.deepcopy(getattr(config, name)) for name in _SHARED},
        attention_bias=getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
        layer_widths=widths,
        name_or_path=config.name_or_path,
    )


def cut_state_dict(state: dict[str, Tensor], space: MaskSpace, mask: Tensor) -> dict[str, Tensor]:
    """Slices every tensor that a cut touches; the order of kept rows and columns is preserved.

    state: weights, biases and LoRA factors of a causal LM, wrapped by PEFT or not, or optimizer moments under the same
    names plus a suffix. Output cuts take rows of weights, biases and LoRA B; input cuts columns of weights and LoRA A.
    """
    kept: dict[tuple[int, str], list[Tensor | None]] = {}
    for structure in space.structures:
        keep = mask[structure.span].cpu()
        for cut in structure.cuts:
            kept.setdefault((structure.layer, cut.module), [None, None])[cut.axis] = keep[cut.owner].nonzero().flatten()
    result = {}
    for name, tensor in state.items():
        match = _LINEAR.search(name)
        sides = kept.get((int(match[1]), match[2])) if match else None
        result[name] = tensor if sides is None or tensor.ndim == 0 else _slice(tensor, match[3], *sides)
    return result


def _slice(tensor: Tensor, parameter: str, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    if "lora_A" in parameter:
        rows = None
    elif "lora_B" in parameter:
        cols = None
    rows, cols = (None if index is None else index.to(tensor.device) for index in (rows, cols))
    if tensor.ndim == 1:
        return tensor if rows is None else tensor[rows]
    return tensor if rows is None and cols is None else compact(tensor.detach(), rows, cols)


def cut_model(model: nn.Module, space: MaskSpace, mask: Tensor) -> nn.Module:
    """The smaller model: an `ATPLlamaForCausalLM`, wrapped in the same kind of PEFT adapter as the given one.

    model: a causal LM or a `PeftModel` around one, adapter `default`. Weights that no cut touches are shared with it,
    the others are new and smaller, so the peak is far below two models. dtypes, devices and requires_grad are kept.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    state = cut_state_dict(_plain_state(base), space, mask)
    cut = _build(cut_config(base.config, space, mask), state, base.generation_config)
    if not isinstance(model, PeftModel):
        return cut
    factors = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    with torch.random.fork_rng(devices=[]):  # the new factors are overwritten: their init must not move the run's RNG
        wrapped = get_peft_model(cut, model.peft_config["default"])
    smaller = cut_state_dict({n: p.detach() for n, p in factors.items()}, space, mask)
    for name, parameter in wrapped.named_parameters():
        if name in smaller:
            parameter.data = smaller[name].contiguous().clone()
            parameter.requires_grad_(factors[name].requires_grad)
    return wrapped


def merge_adapter(model: PeftModel) -> ATPLlamaForCausalLM:
    """A plain model whose weights hold W + scaling * B A, summed in float32; the given model stays as it is."""
    base = model.get_base_model()
    state = _plain_state(base)
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default").float()
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    return _build(base.config, state, base.generation_config)


def _plain_state(base: nn.Module) -> dict[str, Tensor]:
    """Weights of a causal LM under stock names, without LoRA factors."""
    state = base.state_dict()
    return {n.replace(".base_layer.", "."): t.detach() for n, t in state.items() if ".lora_" not in n}


def _build(config: ATPLlamaConfig, state: dict[str, Tensor], generation_config: object) -> ATPLlamaForCausalLM:
    """A model around given tensors: made on the meta device, so that nothing is allocated twice."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = ATPLlamaForCausalLM(config)
    if config.tie_word_embeddings:
        state = {n: t for n, t in state.items() if n != "lm_head.weight"}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise RuntimeError(f"the cut weights do not fit the cut model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    device = model.model.embed_tokens.weight.device
    model.model.rotary_emb = LlamaRotaryEmbedding(config=config).to(device)  # its buffers are in no state dict
    model.generation_config = copy.deepcopy(generation_config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
