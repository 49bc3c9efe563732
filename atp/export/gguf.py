"""A model as one GGUF file, as llama.cpp reads it.

A model whose layers have equal widths takes the architecture of its family; others take `deci`, the one architecture of
llama.cpp with heads and MLP width per layer, and with layers that lack attention. A layer without both of its blocks is
left out. A block of zeros stands for an MLP that is missing alone, since llama.cpp skips all of such a layer, and for
attention in the first layer, from which it reads the width of heads. Weights are written as they are but for two things
that architectures ask for: the order of the rows that RoPE rotates, and multipliers that only Granite's architecture
knows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION, MODEL_ARCH
from gguf.quants import dequantize, quantize
from gguf.tensor_mapping import get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.export.gguf_rope import Rope, rope_of
from atp.export.gguf_tokenizer import add_tokenizer
from atp.families import BLOCKS, SKIPPED, ExpertFamily, declared, family_of, layer_config
from atp.ground import progress
from atp.ground.errors import InputError
from atp.ground.files import whole_file
from atp.models.config import SELECTIONS, CutConfig, LayerShape
from atp.models.fused import joined

DTYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
"""What matrices can be written as. Norms and biases are always float32, as llama.cpp wants them.

Under q4_1 embeddings and head are q8_0: every token reads them, and rounding them costs more than other matrices.
"""
_WIDER = {GGMLQuantizationType.Q4_1: GGMLQuantizationType.Q8_0}  # of embeddings and head
_ZERO_CHANNELS = 32  # of an MLP of zeros: a block of the types that are quantized
_LAYER = re.compile(r"^model\.layers\.\d+\.")
_LARGEST_F16 = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Architecture:
    """What an architecture of llama.cpp holds.

    neighbours: whether RoPE rotates rows 2 i and 2 i + 1 of a head, and not rows i and i + head_dim / 2. per_layer:
    widths per layer. any_heads: also heads that together are not as wide as hidden_size. biases: those of o_proj and of
    the MLP (q, k and v may have one everywhere). factors: RoPE frequencies scaled one by one. skips: every which layer
    has no RoPE; 0 for none. multipliers: Granite's. experts: whether it has them in place of the MLP; sums_to_one:
    whether the weights of a token's experts are then divided by their sum. norm_over_heads: whether queries and keys
    have one norm over all heads. full_every: of Gemma's, every which layer sees all tokens; 0 for others. largest: how
    many layers its largest model has, whose scores llama.cpp scales by hidden_size and heads. glm: whether it is
    that of GLM-4-0414, with gate and up in one tensor, norms behind the blocks, and RoPE of a part of each head.
    activation: of the MLP, by its name in transformers; gated: whether the MLP has a gate.
    """

    name: str
    neighbours: bool = True
    per_layer: bool = False
    any_heads: bool = True
    biases: bool = True
    factors: bool = True
    qk_norm: bool = False
    full_every: int = 0
    largest: int = 0
    activation: str = "silu"
    skips: int = 0
    multipliers: bool = False
    experts: bool = False
    sums_to_one: bool = True
    norm_over_heads: bool = False
    gated: bool = True
    glm: bool = False

    @property
    def norms_behind(self) -> bool:
        """Whether norms read what the blocks give."""
        return self.full_every > 0 or self.glm

    def lacks(self, config: CutConfig) -> Iterator[str]:
        """What the model needs and this architecture does not hold."""
        family, shapes = family_of(config), _shapes(config)
        rotated = [config.uses_rope(layer) for layer in _layers(config)]
        if not self.per_layer and any(shape.skip for shape in shapes):
            yield "layers without attention or MLP"
        elif not self.per_layer and any(shape != shapes[0] for shape in shapes):
            yield "widths per layer"
        elif not self.any_heads and shapes[0].num_attention_heads * config.head_dim != config.hidden_size:
            yield "heads that are not as wide as hidden_size"
        if family.qk_norm != self.qk_norm:
            yield "norms of queries and keys" if family.qk_norm else "queries and keys without norms"
        if rotated != [not self.skips or (layer + 1) % self.skips != 0 for layer in range(len(rotated))]:
            yield "RoPE in just these layers"
        biases = family.biases(config)
        if (family.blocks is not BLOCKS) != self.norms_behind:
            yield "norms behind the blocks"
        if self.full_every:
            yield from self._lacks_of_gemma(config)
        if family.layer_norm:
            yield "LayerNorms"
        if (len(family.mlp) == 3) != self.gated:
            yield "an MLP with a gate" if len(family.mlp) == 3 else "an MLP without a gate"
        if not self.biases and (biases.o or biases.mlp):
            yield "biases of o_proj or the MLP"
        has_experts = isinstance(family, ExpertFamily)
        if has_experts != self.experts:
            yield "experts" if has_experts else "an MLP without experts"
        elif has_experts and declared(config, "norm_topk_prob", True) != self.sums_to_one:
            yield f"weights of experts that {'do not ' if self.sums_to_one else ''}sum to one"
        if declared(config, "clip_qkv", None) is not None:
            yield "clipped queries, keys and values"
        if self.norm_over_heads and shapes[0].num_key_value_heads != shapes[0].num_attention_heads:
            yield "norms over fewer key heads than query heads"
        if not self.factors and _rope(config, self).factors:
            yield f"RoPE scaling of type {cast(dict[str, Any], _with_one_rope(config).rope_parameters)['rope_type']}"

    def _lacks_of_gemma(self, config: CutConfig) -> Iterator[str]:
        full = [config.window(layer) is None for layer in _layers(config)]
        if full != [(layer + 1) % self.full_every == 0 for layer in range(len(full))]:
            yield "full attention in just these layers"
        if config.attention_bias:
            yield "biases of q, k and v"
        if not config.tie_word_embeddings:
            yield "a head of its own"
        caps = declared(config, "attn_logit_softcapping", None), declared(config, "final_logit_softcapping", None)
        if (None in caps) if self.name == "gemma2" else caps != (None, None):
            yield "these soft caps"
        parameters: Any = config.rope_parameters
        if self.name == "gemma3" and parameters["sliding_attention"] != _SLIDING_ROPE:
            yield "this RoPE of sliding layers"


_SLIDING_BASE = 10_000.0  # of RoPE in Gemma 3's sliding layers, as llama.cpp has it
_SLIDING_ROPE = {"rope_type": "default", "rope_theta": _SLIDING_BASE}
_OWN = {
    "qwen2": Architecture("qwen2", neighbours=False, any_heads=False, biases=False, factors=False),
    "qwen3": Architecture("qwen3", neighbours=False, biases=False, factors=False, qk_norm=True),
    "smollm3": Architecture("smollm3", biases=False, factors=False, skips=4),
    "granite": Architecture("granite", multipliers=True),
    "mixtral": Architecture("llama", experts=True),
    "qwen3_moe": Architecture("qwen3moe", neighbours=False, biases=False, factors=False, qk_norm=True, experts=True),
    "olmoe": Architecture(
        "olmoe", neighbours=False, any_heads=False, biases=False, factors=False, experts=True, sums_to_one=False,
        qk_norm=True, norm_over_heads=True,
    ),
    "gemma2": Architecture(
        "gemma2", neighbours=False, biases=False, factors=False, full_every=2, largest=46,
        activation="gelu_pytorch_tanh",
    ),
    "gemma3_text": Architecture(
        "gemma3", neighbours=False, biases=False, factors=False, qk_norm=True, full_every=6, largest=62,
        activation="gelu_pytorch_tanh",
    ),
    "arcee": Architecture("arcee", activation="relu2", biases=False, gated=False),
    "glm4": Architecture("glm4", biases=False, factors=False, glm=True),
}  # fmt: skip
_ANY = (Architecture("llama"), Architecture("deci", per_layer=True))


def architecture_of(config: CutConfig, where: str) -> Architecture:
    """The first architecture that holds the model: its family's own, `llama`, `deci`.

    config: an uncut model's is `CutConfig.from_whole`. where: names the model in messages. Raises `InputError` for
    what llama.cpp cannot run.
    """
    for problem, remedy in _inexpressible(config):
        raise InputError(f"{where} cannot become a GGUF file, because {problem}: {remedy}")
    candidates = (*([_OWN[config.family]] if config.family in _OWN else []), *_ANY)
    lacking = {found: list(found.lacks(config)) for found in candidates}
    fitting = [found for found, lacks in lacking.items() if not lacks]
    if not fitting:
        reasons = "; ".join(f"{found.name} lacks {' and '.join(lacks)}" for found, lacks in lacking.items())
        raise InputError(
            f"{where} cannot become a GGUF file, because no architecture of llama.cpp holds it ({reasons}): use its "
            "folder with transformers, or cut all layers to the same widths"
        )
    return fitting[0]


def write_gguf(
    model: PreTrainedModel, config: CutConfig, tokenizer: PreTrainedTokenizerBase, architecture: Architecture,
    dtype: str, out: Path, facts: dict[str, Any],
) -> list[str]:  # fmt: skip
    """Writes the file, in one step, and returns what its user should know, one sentence each.

    config: of the model, as for `architecture_of`. dtype: a key of `DTYPES`. facts: what is known of name, license,
    language and base_model, as in a model card. Raises `InputError` for a tokenizer that llama.cpp cannot read, and for
    weights that float16 cannot hold.
    """
    progress.begin("writing")
    wanted, file_type = DTYPES[dtype]
    writer = GGUFWriter(None, architecture.name)
    _add_facts(writer, facts)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_shape(writer, config, architecture)
    remarks = add_tokenizer(writer, tokenizer, config)
    weights = dict(_weights(model, config, architecture))
    held = {name: _held_as(name, weight, wanted) for name, weight in weights.items()}
    for name, weight in weights.items():
        block, size = GGML_QUANT_SIZES[held[name]]
        nbytes = weight.tensor.numel() // block * size
        writer.add_tensor_info(name, weight.tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=held[name])
    with whole_file(out) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (name, weight) in enumerate(weights.items()):
                progress.count(done, len(weights))
                values = weight.values()
                if held[name] == GGMLQuantizationType.F16 and np.abs(values).max() > _LARGEST_F16:
                    raise InputError(f"weight {name} holds values beyond float16: use --dtype bf16 or f32")
                writer.write_tensor_data(quantize(values, held[name]).view(_Written))
        finally:
            writer.close()
    rope = _rope(config, architecture).remark
    remarks += [
        *_window_remark(config, architecture),
        *([rope] if rope else []),
        *_fallback_remark(weights, held, wanted),
    ]
    return remarks


@torch.no_grad()
def read_back(model: PreTrainedModel, config: CutConfig, architecture: Architecture, path: Path) -> None:
    """Gives a float32 model, in place, the weights that a file written from its kind holds, dequantized.

    It then computes what the file says, but for what llama.cpp rounds while it runs, and where tied weights lie in the
    file twice, rounded apart (Granite in `deci`): the head's count. config, architecture: as for
    `write_gguf`.
    """
    held = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, weight in _weights(model, config, architecture):
        found = held[name]
        weight.take(dequantize(found.data, found.tensor_type))


class _Written(np.ndarray):
    """An array that is written through Python: numpy loses the errno, and errors of the last bytes altogether."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(np.ascontiguousarray(self).data)


@dataclass(frozen=True)
class _Weight:
    """A tensor of the model, which the file holds as (tensor + offset) * factor.

    heads: number of heads whose rows take the order that neighbours=True wants, or 0. rotated: how many rows of each
    RoPE rotates, its first ones; still: a factor of the others. exact: whether it stays float32, as routers do.
    sources: the model's tensors that it joins; none where it is one of them.
    """

    tensor: Tensor
    heads: int = 0
    rotated: int = 0
    still: float = 1.0
    factor: float = 1.0
    offset: float = 0.0
    exact: bool = False
    sources: tuple[Tensor, ...] = ()

    def values(self) -> np.ndarray:
        """As the file holds them, in float32."""
        values = self.tensor.detach().to("cpu", torch.float32)
        if self.heads:
            by_head = values.view(self.heads, -1, *values.shape[1:])  # [heads, row, ...]
            turning, still = by_head[:, : self.rotated], by_head[:, self.rotated :]
            turning = turning.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            values = torch.cat([turning, still * self.still], 1).view(values.shape)
        values = values + self.offset if self.offset else values
        return (values if self.factor == 1 else values * self.factor).contiguous().numpy()

    def take(self, values: np.ndarray) -> None:
        """The inverse of `values`: sets the tensor, or those that it joins, which are float32."""
        found = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(self.tensor.shape)
        found = found / self.factor - self.offset
        if self.heads:
            by_head = found.view(self.heads, -1, *found.shape[1:])
            turning, still = by_head[:, : self.rotated], by_head[:, self.rotated :]
            turning = turning.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)  # [heads, half, row in it, ...]
            found = torch.cat([turning, still / self.still], 1).view(found.shape)
        targets = self.sources or (self.tensor,)
        for target, part in zip(targets, found.split([len(target) for target in targets]), strict=True):
            target.copy_(part)


def _layers(config: CutConfig) -> list[int]:
    """The layers that the file holds, in its order: those with a block."""
    every = range(config.num_hidden_layers)
    return [layer for layer in every if not {*SKIPPED.values()} <= {*config.layer_shape(layer).skip}]


def _shapes(config: CutConfig) -> list[LayerShape]:
    return [config.layer_shape(layer) for layer in _layers(config)]


def _held_shapes(config: CutConfig) -> list[LayerShape]:
    """The widths in the file, those of blocks of zeros included."""
    shapes: list[LayerShape] = []
    for shape in _shapes(config):
        heads, kv_heads = shape.heads if shapes or "attention" not in shape.skip else (1, 1)
        inner = _ZERO_CHANNELS if "mlp" in shape.skip else shape.intermediate_size
        held = replace(shape, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner)
        shapes.append(held)
    return shapes


def _zeros(config: CutConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights of blocks of zeros, by the names that they would have in a model of as many layers as the file."""
    hidden = config.hidden_size
    for place, shape in enumerate(_held_shapes(config)):
        for block, name in SKIPPED.items():
            if name not in shape.skip or (name == "attention" and not shape.num_attention_heads):
                continue
            (norm,) = (own.before for own in BLOCKS if own.module == block)
            yield f"model.layers.{place}.{norm}.weight", torch.ones(hidden)
            for linear, sides in (
                replace(shape, skip=()).linears(config.head_dim, hidden, family_of(config).mlp).items()
            ):
                if linear.startswith(f"{block}."):
                    yield f"model.layers.{place}.{linear}.weight", torch.zeros(sides)


def _rope(config: CutConfig, architecture: Architecture) -> Rope:
    plain = cast(dict[str, Any], config.rope_parameters).get("rope_type") == "default"
    return Rope() if architecture.glm and plain else rope_of(_with_one_rope(config))


def _with_one_rope(config: CutConfig) -> CutConfig:
    """The config with the RoPE of full attention, where layers differ in it."""
    parameters = cast(dict[str, Any], config.rope_parameters)
    if "full_attention" not in parameters:
        return config
    flat: Any = copy.copy(config)
    flat.rope_parameters = parameters["full_attention"]
    return cast(CutConfig, flat)


def _inexpressible(config: CutConfig) -> Iterator[tuple[str, str]]:
    """What no architecture holds, each with a remedy."""
    heads = config.head_dim
    for layer, shape in zip(_layers(config), _shapes(config), strict=True):
        for what, width in (("queries and keys", shape.qk_head_dim(heads)), ("values", shape.v_head_dim)):
            if width != heads:
                yield (
                    f"its layer {layer} has {what} of width {width} in heads of {heads}, and llama.cpp has one width "
                    "for all heads",
                    "cut in space kv_group, which keeps heads whole",
                )
        if any(shape.selected(key, config.hidden_size) != config.hidden_size for key in SELECTIONS):
            yield (
                f"the blocks of its layer {layer} read or write a part of the hidden state, which llama.cpp cannot",
                "cut in space kv_group",
            )
    if config.shortcuts:
        yield "it has a matrix on each residual connection, which llama.cpp has not", "use its folder with transformers"
    family = family_of(config)
    own = _OWN.get(config.family, _ANY[0])
    apart = family.own_attention and not family.neighbours and not own.norm_over_heads
    if apart or (family.blocks is not BLOCKS and not own.norms_behind):
        yield "its blocks are not those of Llama, which the architectures here hold", "use its folder with transformers"
    if (activation := family.hidden_act(config)) != own.activation:
        yield f"its activation is {activation}, and llama.cpp has {own.activation}", "use its folder with transformers"


def _window(config: CutConfig) -> int | None:
    """The smallest sliding window of any layer."""
    windows = (config.window(layer) for layer in _layers(config))
    return min((window for window in windows if window is not None), default=None)


def _add_facts(writer: GGUFWriter, facts: dict[str, Any]) -> None:
    known = {name: value if isinstance(value, list) else [value] for name, value in facts.items() if value}
    writer.add_type("model")
    writer.add_name(str(facts["name"]))
    if "license" in known:
        writer.add_license(", ".join(map(str, known["license"])))
    if "language" in known:
        writer.add_languages([str(name) for name in known["language"]])
    if "base_model" in known:
        writer.add_base_model_count(len(known["base_model"]))
    for index, base in enumerate(known.get("base_model", [])):
        writer.add_base_model_name(index, str(base).rpartition("/")[2])
        writer.add_base_model_repo_url(index, f"https://huggingface.co/{base}")


def _add_shape(writer: GGUFWriter, config: CutConfig, architecture: Architecture) -> None:
    """The keys from which llama.cpp builds the model."""
    shapes = _held_shapes(config)
    heads = [shape.num_attention_heads for shape in shapes]
    kv_heads = [shape.num_key_value_heads for shape in shapes]
    inner = [shape.intermediate_size for shape in shapes]
    each = architecture.per_layer
    writer.add_head_count(heads if each else heads[0])
    writer.add_head_count_kv(kv_heads if each else kv_heads[0])
    writer.add_feed_forward_length(inner if each else inner[0])
    family = family_of(config)
    if isinstance(family, ExpertFamily):
        routed = family.routed(layer_config(config, 0))
        writer.add_expert_count(routed.experts)
        writer.add_expert_used_count(routed.taken)
        if family.inner != "intermediate_size":
            writer.add_expert_feed_forward_length(routed.inner)
    writer.add_block_count(len(shapes))
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    length, window = config.max_position_embeddings, _window(config)
    # Within a window sliding attention is full attention, the only kind that most architectures have.
    writer.add_context_length(length if window is None or architecture.full_every else min(length, window))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for add in (writer.add_key_length, writer.add_value_length):
        add(config.head_dim)
    writer.add_rope_dimension_count(family.rotated(config) if architecture.glm else config.head_dim)
    writer.add_rope_freq_base(cast(dict[str, Any], _with_one_rope(config).rope_parameters)["rope_theta"])
    _rope(config, architecture).add_keys(writer)
    if architecture.full_every:
        writer.add_sliding_window(window if window is not None else length)
        if architecture.name == "gemma2":
            writer.add_attn_logit_softcapping(declared(config, "attn_logit_softcapping", None))
            writer.add_final_logit_softcapping(declared(config, "final_logit_softcapping", None))
        else:
            writer.add_rope_freq_base_swa(_SLIDING_BASE)
    if architecture.multipliers:
        factors = _factors(config)
        if factors["attention_multiplier"] is not None:
            writer.add_attention_scale(factors["attention_multiplier"])
        writer.add_embedding_scale(factors["embedding_multiplier"])
        writer.add_residual_scale(factors["residual_multiplier"])
        writer.add_logit_scale(factors["logits_scaling"])


def _weights(model: PreTrainedModel, config: CutConfig, architecture: Architecture) -> Iterator[tuple[str, _Weight]]:
    """The tensors of the file by their names in it."""
    layers = _layers(config)
    names = get_tensor_name_map(MODEL_ARCH[architecture.name.upper()], len(layers))
    folded = {} if architecture.multipliers else _multipliers(config)
    if architecture.full_every:
        folded = {"q_norm" if architecture.qk_norm else "q_proj": _gemma_scale(config, architecture)}
    family = family_of(config)
    tied = config.tie_word_embeddings and folded.get("embed_tokens", 1) == folded.get("lm_head", 1)
    rope = _rope(config, architecture)
    yield from ((name, _Weight(factors)) for name, factors in rope.factors.items())
    router = family.router if isinstance(family, ExpertFamily) else None
    shapes = _held_shapes(config)
    places = {f"model.layers.{layer}.": f"model.layers.{place}." for place, layer in enumerate(layers)}
    state = model.state_dict()
    stored, fused = (joined(state, family), family.fused) if architecture.glm else (state, {})
    own = ((_LAYER.sub(lambda found: places[found[0]], name), each) for name, each in stored.items())
    for name, tensor in (*own, *_zeros(config)):
        module = name.rsplit(".", 2)[-2]
        if module == "experts":
            yield from ((f"{names.get_name(part)}.weight", _Weight(own)) for part, own in _parts(name, tensor))
            continue
        if module == "lm_head" and tied:
            continue  # llama.cpp takes the embeddings where there is no output.weight
        heads = 0
        if architecture.neighbours and not family.neighbours and module in ("q_proj", "k_proj"):
            shape = shapes[int(name.split(".")[2])]
            heads = shape.num_attention_heads if module == "q_proj" else shape.num_key_value_heads
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"GGUF has no name for {name} in architecture {architecture.name}")
        offset = 1.0 if family.unit_offset and "norm" in module else 0.0
        exact = router is not None and f".{router}." in name
        split = [(whole, part) for whole, parts in fused.items() if f".{whole}." in name for part in parts]
        sources = tuple(state[name.replace(whole, part)] for whole, part in split)
        rotated, factor = family.rotated(config), folded.get(module, 1.0)
        yield found, _Weight(tensor, heads, rotated, rope.still, factor, offset, exact, sources)


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The projections that stacked weights hold, by the names that they would have alone."""
    of_both = name.removesuffix("gate_up_proj")
    if of_both == name:
        yield name, tensor
    else:
        yield from zip((f"{of_both}gate_proj", f"{of_both}up_proj"), tensor.chunk(2, dim=1), strict=True)


def _factors(config: CutConfig) -> dict[str, Any]:
    """Granite's multipliers; in other families they are one, and the attention scale is None: head_dim ** -0.5."""
    neutral = {"attention_multiplier": None, "embedding_multiplier": 1, "residual_multiplier": 1, "logits_scaling": 1}
    return {key: declared(config, key, value) for key, value in neutral.items()}


def _multipliers(config: CutConfig) -> dict[str, float]:
    """Factors on the outputs of modules with which an architecture without multipliers computes the same."""
    factors = _factors(config)
    scale, residual = factors["attention_multiplier"], factors["residual_multiplier"]
    return {
        "embed_tokens": factors["embedding_multiplier"],
        "q_proj": 1.0 if scale is None else scale * config.head_dim**0.5,
        "o_proj": residual,
        "down_proj": residual,
        "lm_head": 1 / factors["logits_scaling"],
    }


def _gemma_scale(config: CutConfig, architecture: Architecture) -> float:
    """The scale of scores as a multiple of what llama.cpp takes, which for the largest model goes by the heads."""
    largest = len(_layers(config)) == architecture.largest
    width = config.hidden_size // _shapes(config)[0].num_attention_heads if largest else config.head_dim
    scalar: float = declared(config, "query_pre_attn_scalar", width)
    return (width / scalar) ** 0.5


def _held_as(name: str, weight: _Weight, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of one tensor: blocks run along rows, so not every width can be quantized."""
    if name in ("token_embd.weight", "output.weight"):
        wanted = _WIDER.get(wanted, wanted)
    if weight.exact or weight.tensor.dim() < 2:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if weight.tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _window_remark(config: CutConfig, architecture: Architecture) -> Iterator[str]:
    window = _window(config)
    if architecture.full_every:
        return
    if window is not None and window < config.max_position_embeddings:
        yield (
            f"the context length in the file is {window} of {config.max_position_embeddings} tokens, because llama.cpp "
            "runs this model without its sliding window, which makes no difference only up to there"
        )


def _fallback_remark(
    weights: dict[str, _Weight], held: dict[str, GGMLQuantizationType], wanted: GGMLQuantizationType
) -> Iterator[str]:
    f16 = GGMLQuantizationType.F16
    others = [n for n, weight in weights.items() if weight.tensor.dim() > 1 and held[n] == f16 != wanted]
    if others:
        yield (
            f"{len(others)} of {sum(weight.tensor.dim() > 1 for weight in weights.values())} matrices are f16, because "
            f"{wanted.name.lower()} takes rows of whole blocks of {GGML_QUANT_SIZES[wanted][0]} ({others[0]}, ...)"
        )
