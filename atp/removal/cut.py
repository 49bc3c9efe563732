"""The physical cut: takes removed rows and columns out of base weights, biases and LoRA factors, bit for bit.

Everything follows the table of `MaskSpace`: a cut on axis 0 of a linear removes rows of its weight, bias and LoRA B, a
cut on axis 1 removes columns of its weight and LoRA A (docs/method.md section 6).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from atp.families import EXPERTS, Block, Channels, Linear
from atp.lora.experts import STACKED, expert_factors
from atp.lora.layer import fuse_layers
from atp.models.config import CutConfig
from atp.models.cut import build, complete
from atp.sharding.shards import fill, is_sharded, shard, whole
from atp.spaces.expert_channels import places
from atp.spaces.space import MaskSpace, Structure
from atp_kernels import QuantizedWeight, compact
from atp_kernels.quantized import dense

_LAYER = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)\.(?P<name>.+)$")
_LINEAR = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)\.(?P<module>(?:self_attn|mlp)\.\w+?)\.(?P<parameter>.+)$")
# Which axes of a parameter are cut: rows (outputs of the linear) and columns (inputs).
_PARAMETERS = (
    (r"(?:base_layer\.)?weight", (True, True)),
    (r"(?:base_layer\.)?bias", (True, False)),
    (r"lora_A(?:\.\w+)?\.weight", (False, True)),
    (r"lora_B(?:\.\w+)?\.weight", (True, False)),
)
# The end of the name of an optimizer state of the parameter; `step` is the same for all its rows.
_OPTIMIZER_STATE = r"(?:\.\w+)?"
_HEADS = {"num_attention_heads", "num_key_value_heads"}
# Of all experts of a layer, one after the other: a stacked parameter, or a factor of the adapter on one. PEFT wraps the
# experts once for each, so the inner wrapper is the one of what was wrapped first.
_STACKED = re.compile(
    rf"(?P<wraps>(?:base_layer\.)*)(?:(?P<name>(?:gate_up_proj|down_proj)(?:_bias)?)|(?P<factor>lora_[AB])(?:\.\w+)?\.weight)"
    rf"{_OPTIMIZER_STATE}"
)
_Kept = tuple[Tensor | None, Tensor | None]


def cut_state_dict(state: dict[str, Tensor], space: MaskSpace, mask: Tensor) -> dict[str, Tensor]:
    """The state dict of the cut model, under the same keys, without those of blocks that it lacks.

    state: of a causal LM, plain or inside a PEFT model with LoRA; tensors that no decision touches are shared, not
    copied. The state of an optimizer, named `<parameter name>.<state name>`, is cut in the same way.
    mask: bool [space.size], True keeps. Kept rows and columns keep their order, so RoPE pairs stay paired.
    Raises ValueError for a mask that empties all blocks, or a structure that is none; for an unknown parameter of a cut
    linear, or a wrong size.
    """
    kept, gone = _kept_indices(space, mask), space.gone(mask)
    return {name: _cut_parameter(name, tensor, space, kept) for name, tensor in state.items() if not _goes(name, gone)}


def _drop(model: nn.Module, name: str) -> None:
    """Takes a parameter out of a model."""
    place, _, parameter = name.rpartition(".")
    delattr(model.get_submodule(place), parameter)


def cut_config(config: PretrainedConfig, space: MaskSpace, mask: Tensor) -> CutConfig:
    """The config of the cut model, from the config before the cut. Raises ValueError as `cut_state_dict`.

    Widths in which layers differed already and that this space does not cut stay as they are.
    """
    _check_mask(space, mask)
    layers = {layer: space.layer_widths(layer, mask) for layer in range(space.num_layers)}
    if isinstance(config, CutConfig):
        layers = {layer: config.own_widths(layer) | widths for layer, widths in layers.items()}
        for layer, widths in layers.items():  # a space may leave out what a layer lacks already
            if lacks := {*widths.get("skip", ()), *config.layer_shape(layer).skip}:
                widths["skip"] = sorted(lacks)
    same = {
        key: value
        for key, value in layers[0].items()
        if key != "skip" and all(widths.get(key, ()) == value for widths in layers.values())
    }
    if not _HEADS <= same.keys():  # one count of query heads need not be a multiple of the model's key heads
        same = {key: value for key, value in same.items() if key not in _HEADS}
    own = {layer: {key: value for key, value in widths.items() if key not in same} for layer, widths in layers.items()}
    return CutConfig.from_whole(config, **same, per_layer_config=own if any(own.values()) else None)


@torch.no_grad()
def cut_model(
    model: PreTrainedModel | PeftModel, space: MaskSpace, mask: Tensor, *, spend: bool = False
) -> PreTrainedModel | PeftModel:
    """A smaller model that computes what `model` computes under `mask` on the sums, LoRA included.

    model: a causal LM of a supported family, plain or with one LoRA adapter; the result then has an adapter of the same
    config and layer classes. Merge DoRA first, whose norms are of whole rows. Dtypes, devices, requires_grad and
    training mode are kept; set hooks, masks and gradient checkpointing again. Only cut weights take new memory: the
    result shares all other tensors with `model`, so drop `model` afterwards. spend: each weight of `model` goes as its
    cut form is made, so that only one exists twice at a time; `model` is of no use then. A sharded model is cut weight
    by weight, each gathered and dropped again, into the shards of the smaller one. Raises ValueError as
    `cut_state_dict`.
    """
    source: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = cut_config(source.config, space, mask)
    with torch.device("meta"):
        base = build(config)
    kept = _kept_indices(space, mask)
    in_shards = is_sharded(source)
    if in_shards:
        _fill_shards(base, source, lambda name, weight: _cut_parameter(name, weight, space, kept))
    with torch.device("meta"):
        cut = _wrap_like(model, base) if isinstance(model, PeftModel) else base
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {name: tensor for name, tensor in model.state_dict().items() if not in_shards or ".lora_" in name}
    gone, smaller = space.gone(mask), {}
    for name in list(state):
        tensor = state.pop(name)
        if _goes(name, gone):
            continue
        smaller[name] = _cut_parameter(name, tensor, space, kept)
        if spend and smaller[name] is not tensor:
            del tensor
            _drop(model, name)
    cut.load_state_dict(smaller, assign=True, strict=not in_shards)
    complete(base, source, tie=not in_shards)
    for name, parameter in cut.named_parameters():
        parameter.requires_grad_(trainable[name])
    return cut.train(model.training)


@torch.no_grad()
def merge_adapter(model: PeftModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A plain model of the base's class whose weights hold V = W + scaling * B A; `model` stays as it is.

    With DoRA row i of V is divided by its norm and multiplied by its magnitude.

    The sum is formed in float64, from a quantized W as it is dequantized, and rounded once to `dtype`, by default that
    of W. Only merged weights are new memory, other tensors are shared with `model`. Raises ValueError for other
    adapters than one of LoRA or DoRA. Of a sharded model one weight at a time is whole, and the result is sharded too.
    """
    adapter, _ = _adapter_config(model)
    layers = adapted(model.get_base_model())
    return _plain(
        model, lambda name, weight: _merged(layers[name], adapter, weight, dtype) if name in layers else dense(weight)
    )


def plain_name(name: str) -> str:
    """The name that a parameter of a model with an adapter has without it, both inside the base model."""
    return name.replace(".base_layer", "")


def adapted(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers of an adapter by the names of the weights that they are on, without an adapter (`plain_name`)."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {f"{plain_name(name)}.{getattr(layer, 'parameter_name', 'weight')}": layer for name, layer in found}


@torch.no_grad()
def base_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """A plain model of the base's class without the adapter; shares all tensors but quantized ones with `model`."""
    return _plain(model, lambda name, weight: dense(weight))


def _plain(model: PeftModel | PreTrainedModel, change: Callable[[str, Tensor], Tensor]) -> PreTrainedModel:
    source: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.device("meta"):
        plain = type(source)(copy.deepcopy(source.config))
    if is_sharded(source):
        _fill_shards(plain, source, change)
    else:
        state = {plain_name(n): t for n, t in source.state_dict().items() if ".lora_" not in n}
        plain.load_state_dict({name: change(name, tensor) for name, tensor in state.items()}, assign=True)
    complete(plain, source, tie=not is_sharded(plain))
    return plain.train(model.training)


def _check_mask(space: MaskSpace, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != (space.size,):
        raise ValueError(f"mask must be bool [{space.size}] for this space, not {mask.dtype} {list(mask.shape)}")
    for structure in space.structures:
        kept = int(mask[structure.span].sum())
        if kept < structure.least and (kept or structure.block is None):
            raise ValueError(
                f"layer {structure.layer} would keep {kept or 'none'} of its {structure.size} {structure.name} "
                f"decisions: keep at least {'one' if structure.least == 1 else structure.least}, because "
                + ("without it there is no block left" if structure.least == 1 else _who_takes(structure))
            )
        by_group = mask[structure.span].view(structure.groups, structure.size // structure.groups).sum(1)
        if by_group.min() < by_group.max():
            raise ValueError(
                f"layer {structure.layer} would keep from {int(by_group.min())} to {int(by_group.max())} channels of "
                "its experts, whose weights are stacked: keep equally many of each"
            )
    if all(len(gone) == len(space.blocks) for gone in space.gone(mask)):
        raise ValueError("the mask removes every block of every layer: keep at least one")


def _who_takes(structure: Structure) -> str:
    return "each token takes as many" if structure.groups == 1 else "each expert keeps one"


def _kept_indices(space: MaskSpace, mask: Tensor) -> dict[tuple[int, str], tuple[_Kept, tuple[int, int]]]:
    """For every linear its kept rows and columns (None: all), and its shape before the cut."""
    _check_mask(space, mask)
    kept = {}
    for layer, module, *masks in space.module_masks(mask):
        rows, columns = (None if side is None or bool(side.all()) else side.nonzero().flatten() for side in masks)
        linear = space.linears[layer][module]
        kept[layer, module] = (rows, columns), (linear.out_features, linear.in_features)
    return kept


def _goes(name: str, gone: list[list[Block]]) -> bool:
    """Whether a parameter, or a state of it, belongs to a block that goes as a whole."""
    match = _LAYER.search(name)
    return match is not None and any(block.holds(match["name"]) for block in gone[int(match["layer"])])


def _cut_parameter(name: str, tensor: Tensor, space: MaskSpace, kept: dict) -> Tensor:
    match = _LINEAR.search(name)
    if match is None or match["module"] not in space.modules or tensor.ndim == 0:
        return tensor
    parameter, linear = match["parameter"], space.linears[int(match["layer"])][match["module"]]
    if match["module"] == EXPERTS:
        rows = kept[int(match["layer"]), EXPERTS][0][0]
        return _cut_experts(name, parameter, tensor, linear, rows)
    axes = next((axes for pattern, axes in _PARAMETERS if re.fullmatch(pattern + _OPTIMIZER_STATE, parameter)), None)
    if axes is None:
        raise ValueError(f"cannot cut '{name}': only weights, biases and plain LoRA factors are known, merge it first")
    indices, sizes = kept[int(match["layer"]), match["module"]]
    # A vector has no columns, and the rank axis of a LoRA factor is never cut.
    for axis in range(min(tensor.ndim, len(axes))):
        if axes[axis] and tensor.shape[axis] != sizes[axis]:
            raise ValueError(
                f"'{name}' has shape {list(tensor.shape)} and the mask space expects {sizes[axis]} on axis {axis}: "
                "build the space from the config of this model"
            )
    rows, columns = (
        index.to(tensor.device) if cuts and index is not None else None
        for index, cuts in zip(indices, axes, strict=True)
    )
    if rows is None and columns is None:
        return tensor
    if isinstance(tensor, QuantizedWeight):
        return tensor.kept(rows, columns)
    return compact(tensor, rows, columns) if tensor.ndim == 2 else tensor.detach()[rows]


def _cut_experts(name: str, parameter: str, tensor: Tensor, linear: Linear, rows: Tensor | None) -> Tensor:
    """A stacked parameter of experts, or a factor of LoRA on one, without the experts or channels that go.

    parameter: its name in the experts. rows: those of `linear` that stay, rising; None for all.
    """
    found = _STACKED.fullmatch(parameter)
    if found is None:
        raise ValueError(f"cannot cut '{name}': only weights, biases and LoRA of experts are known, merge it first")
    factor, count = found["factor"], linear.experts if isinstance(linear, Channels) else linear.out_features
    on = found["name"] or STACKED[0 if found["wraps"] else 1]
    side = 0 if factor == "lora_A" else 1
    if tensor.shape[side] % count if factor else tensor.shape[0] != count:
        raise ValueError(
            f"'{name}' has shape {list(tensor.shape)} and the mask space expects {count} experts: build the space from "
            "the config of this model"
        )
    if rows is None:
        return tensor
    stacked = expert_factors(tensor.detach(), factor, count) if factor else tensor.detach()
    if not isinstance(linear, Channels):
        stacked = stacked[rows.to(tensor.device)]
    elif (place := _channels_of(on, factor, linear)) is None:
        return tensor
    else:
        axis, own = place
        kept = rows.cpu().view(count, -1) % linear.inner  # [experts, channels of one], and then in their old order
        index = own[kept].flatten(1).sort(1).values.to(tensor.device)
        sides = [index.shape[at != 0] if at in (0, axis) else 1 for at in range(stacked.ndim)]
        sizes = [index.shape[1] if at == axis else size for at, size in enumerate(stacked.shape)]
        if stacked.shape[axis] != own.numel():
            raise ValueError(
                f"'{name}' has shape {list(tensor.shape)} and the mask space expects {own.numel()} on axis {axis}: "
                "build the space from the config of this model"
            )
        stacked = stacked.gather(axis, index.view(sides).expand(sizes))
    if factor is None:
        return stacked
    return (stacked.flatten(0, 1) if factor == "lora_A" else stacked.movedim(0, 2).flatten(1)).contiguous()


def _channels_of(parameter: str, factor: str | None, linear: Channels) -> tuple[int, Tensor] | None:
    """`places` of a stacked parameter, or of a factor [experts, rank, inputs] or [experts, outputs, rank] on it."""
    found = places(parameter, linear)
    if factor is None or found is None:
        return found
    has_channels = (factor == "lora_B") == (parameter == STACKED[0])
    return (1 if factor == "lora_B" else 2, found[1]) if has_channels else None


def _adapter_config(model: PeftModel) -> tuple[str, LoraConfig]:
    if len(model.peft_config) != 1:
        raise ValueError(f"the model has the adapters {', '.join(model.peft_config)}: keep one, delete the others")
    ((adapter, config),) = cast(dict[str, LoraConfig], model.peft_config).items()
    if config.peft_type != "LORA" or config.lora_bias or config.modules_to_save:
        raise ValueError(f"adapter '{adapter}' is not plain LoRA: train it without lora_bias and modules_to_save")
    return adapter, config


def _wrap_like(model: PeftModel, base: PreTrainedModel) -> PeftModel:
    adapter, config = _adapter_config(model)
    if config.use_dora:
        raise ValueError(f"adapter '{adapter}' is DoRA, whose norms of whole rows no cut keeps: merge it first")
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None  # no model on the Hub has these widths
    options: dict[str, Any] = {"adapter_name": adapter, "autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
    wrapped = get_peft_model(base, config, **options)
    wrapped.peft_config[adapter].base_model_name_or_path = None  # PEFT writes the name of the model into it
    return fuse_layers(wrapped)


def _fill_shards(made: PreTrainedModel, source: PreTrainedModel, change: Callable[[str, Tensor], Tensor]) -> None:
    """Shards a model on the meta device and fills it with what `change` makes of each weight of a sharded source."""
    weights = {plain_name(n): p for n, p in source.named_parameters() if ".lora_" not in n}
    device = next(iter(weights.values())).device
    cast(nn.Module, made).to(dtype=source.dtype)
    shard(made, device)
    fill(made, lambda name, rows: change(name, whole(weights[name]))[rows])


def _merged(layer: LoraLayer, adapter: str, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    factors: Any = layer.lora_B[adapter], layer.lora_A[adapter]
    place = "cpu" if weight.device.type == "mps" else weight.device  # which has no float64
    w, b, a = (x.to(place).double() for x in (dense(weight), *(factor.weight for factor in factors)))
    if w.ndim == 3:  # of experts, whose weights may be stored as inputs by outputs
        b, a = (expert_factors(x, name, len(w)) for x, name in ((b, "lora_B"), (a, "lora_A")))
        product = b @ a
        product = product.transpose(1, 2) if cast(Any, layer).get_base_layer().is_transposed else product
        return (w + layer.scaling[adapter] * product).to(weight.device, weight.dtype if dtype is None else dtype)
    merged = torch.addmm(w, b, a, alpha=layer.scaling[adapter])
    if layer.use_dora[adapter]:
        magnitude = layer.lora_magnitude_vector[adapter].weight.to(place).double()
        merged *= (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.to(weight.device, weight.dtype if dtype is None else dtype)
