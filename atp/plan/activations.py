"""What autograd keeps of one pass through the decoder until the backward pass, in bytes per token.

A frozen linear with an adapter keeps its input, for the gradient of A, and S = scaling * x A^T, for that of B. The
linears of one input share it. Attention keeps queries, keys, values, its output and one number per head, or in short
windows on a CPU its probabilities instead of the last; the gated MLP keeps both products and computes their activation
again; a norm keeps its input and one number per token. Everything but the residual stream is in the dtype of the
products. With DoRA, whose linears run one by one, each also keeps the outputs of its base and of its adapter, and the
MLP its activation and their product; the inputs that each casts for itself under autocast are an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from atp.families import family_of
from atp.models.cut import HEAD_DIM_MULTIPLE
from atp.plan.shapes import LayerWidths, ModelShapes
from atp.spaces.space import Cut
from atp.training.cross_entropy import CHUNK_BYTES

_FLOAT = 4


@dataclass(frozen=True)
class Pass:
    """What decides how much a pass keeps.

    product, residual: bytes per number of what linears and attention compute, and of the residual stream. rank: of
    LoRA. watched: whether the gradients of a mask are observed; hard masks and dropout (drawn again) keep nothing.
    apart: whether attention has a mask of its own; expanded: whether keys and values then become as many as queries.
    dora: whether linears run PEFT's forward of DoRA.
    short: tokens of a row whose probabilities attention keeps, 0 where it keeps none. capped: tokens of
    a row whose scores attention caps, 0 where it caps none. rows: samples of a batch, which
    share RoPE's angles. by_expert: whether experts carry LoRA.
    """

    product: int
    residual: int
    rank: int
    watched: bool = False
    apart: bool = False
    expanded: bool = False
    short: int = 0
    capped: int = 0
    rows: int = 1
    dora: bool = False
    by_expert: bool = False


def kept_by_training(shapes: ModelShapes, widths: LayerWidths, how: Pass) -> float:
    """Bytes per token and layer that a LoRA step keeps."""
    linears, hidden = widths.linears, shapes.config.hidden_size
    reads = linears["self_attn.q_proj"].in_features
    if widths.experts is None:
        reads += linears[_producers(shapes)[0]].in_features
    numbers = reads + _attention(widths, how, shapes) + _mlp(widths) + how.rank * len(linears)
    if how.watched and not _in_one_call(shapes, how):
        numbers += _sums(shapes, widths, parts_of_mlp=2)
        if _keeps_values(widths, how) and any(cut.module == "self_attn.v_proj" for cut in _outputs(shapes)):
            numbers -= linears["self_attn.v_proj"].out_features  # the very ones that attention keeps
    if how.dora:
        numbers += sum(2 * linear.out_features for linear in linears.values())
        numbers += 2 * widths.inner if widths.experts is None else 0
        if how.product < _FLOAT:
            numbers += sum(linear.in_features for linear in linears.values()) - reads
    stream = _read_by_norms(shapes, how)
    for ends in ("self_attn.o_proj", family_of(shapes.config).mlp[-1]):
        if ends in linears and linears[ends].out_features != hidden:  # what is added to a part of the stream
            stream += linears[ends].out_features
    if widths.qk_dim != shapes.whole[0].qk_dim:  # the cosines and sines of the pairs that this layer keeps
        stream += 2 * widths.qk_dim / how.rows
    apart = how.by_expert or (how.watched and shapes.space.name == "expert_channels")
    own = numbers * how.product + stream * how.residual + _per_row(widths, how, shapes)
    return own + _beside_experts(widths, how, apart=apart)


def kept_by_full(shapes: ModelShapes, widths: LayerWidths, how: Pass) -> float:
    """Bytes per token and layer that a step keeps in which all weights are trained, in transformers' own modules.

    Each linear casts its input for itself under autocast. The gated MLP also keeps its activation and their product,
    and a norm what it has normalized.
    """
    linears = widths.linears
    readers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    producers = family_of(shapes.config).mlp[:-1]
    readers += producers if widths.experts is None else []
    if how.product == _FLOAT:
        readers = [name for name in readers if name in ("self_attn.q_proj", producers[0])]
    reads = sum(linears[name].in_features for name in readers)
    channels = _mlp(widths) + (2 * widths.inner if widths.experts is None else 0)
    family = family_of(shapes.config)
    stream = (
        2.0 * shapes.config.hidden_size * sum(len([n for n in block[1:] if n is not None]) for block in family.blocks)
    )
    if family.qk_norm and family.unit_offset and how.product < _FLOAT:  # Gemma's norms widen what they read
        stream += 2 * (widths.heads + widths.kv_heads) * widths.qk_dim * (_FLOAT - how.product) / how.residual
    numbers = reads + _attention(widths, how, shapes) + channels
    return numbers * how.product + stream * how.residual + _per_row(widths, how, shapes)


def kept_by_saliency(shapes: ModelShapes, widths: LayerWidths, how: Pass) -> float:
    """Bytes per token and layer that a pass under a soft mask keeps, with LoRA frozen.

    The gradient of a mask on outputs reads them as they were before it; one on inputs reads these. The fused MLP keeps
    the outputs of gate and up anyway; where its inputs are masked too, its linears run one by one.
    """
    read = {cut.module.split(".")[0]: widths.linears[cut.module].in_features for cut in _soft(shapes) if cut.axis == 1}
    numbers = (
        _attention(widths, how, shapes) + _mlp(widths) + _sums(shapes, widths, parts_of_mlp=3) + sum(read.values())
    )
    return numbers * how.product + _read_by_norms(shapes, how) * how.residual + _per_row(widths, how, shapes)


def _read_by_norms(shapes: ModelShapes, how: Pass) -> float:
    """Numbers per token, in the dtype of the residual stream, that norms read: the stream, or outputs of blocks.

    A block without a norm before it casts the stream for each of its linears, which comes to as much as a wide output.
    """
    count = 0.0
    for block in family_of(shapes.config).blocks:
        after = 0.0 if block.after is None else how.product / how.residual
        count += 1 if block.before is None else 1 + after
    return shapes.config.hidden_size * count


def _sums(shapes: ModelShapes, widths: LayerWidths, *, parts_of_mlp: int) -> int:
    """Numbers per token that the gradient of a mask keeps of linears, besides their inputs: the outputs that it reads.

    parts_of_mlp: how many times the width of an MLP more, where what is read keeps its linears from being fused.
    """
    outputs = [cut.module for cut in _outputs(shapes)]
    apart = any(cut.axis == 1 and cut.module in _producers(shapes) for cut in _soft(shapes))
    each = sum(widths.linears[module].out_features for module in outputs)
    return each + (parts_of_mlp * widths.inner if apart else 0)


def _mlp(widths: LayerWidths) -> int:
    """Numbers per token that the MLP keeps of its channels, and experts also of their outputs, which the router weighs.

    Stock experts keep the activation beside both products.
    """
    experts = widths.experts
    return 2 * widths.inner if experts is None else 3 * widths.inner + experts.taken * experts.hidden


def _beside_experts(widths: LayerWidths, how: Pass, *, apart: bool) -> int:
    """Bytes per token that a layer keeps of experts beside those of `_mlp`.

    Stock classes multiply in the dtype of the weights, under autocast too. apart: whether each expert is a product of
    its own, which autocast narrows; then what the down projections read lies there once more, in one piece, and with
    LoRA what both products read and what A gives.
    """
    found = widths.experts
    if found is None:
        return 0
    if not apart:
        return _mlp(widths) * (how.residual - how.product)
    with_lora = (2 * how.rank + found.hidden) * found.taken if how.by_expert else 0
    return (2 * widths.inner + found.taken * found.hidden + with_lora) * how.product


def _soft(shapes: ModelShapes) -> list[Cut]:
    return [cut for structure in shapes.space.layer(0) for cut in structure.cuts if cut.soft]


def _outputs(shapes: ModelShapes) -> list[Cut]:
    linears = set(shapes.space.adapted) - set(_producers(shapes))
    return [cut for cut in _soft(shapes) if cut.axis == 0 and cut.module in linears]


def _producers(shapes: ModelShapes) -> tuple[str, ...]:
    return family_of(shapes.config).mlp[:-1]


def _pads(widths: LayerWidths) -> bool:
    return widths.padded and (widths.qk_dim != widths.v_dim or widths.qk_dim % HEAD_DIM_MULTIPLE != 0)


def _in_one_call(shapes: ModelShapes, how: Pass) -> bool:
    """Whether attention is one call, which keeps the outputs of its linears anyway."""
    reads = any(cut.axis == 1 and cut.module.startswith("self_attn.") for cut in _soft(shapes))
    family = family_of(shapes.config)
    return bool(how.short) and not reads and not family.qk_norm and not family.own_attention


def _keeps_values(widths: LayerWidths, how: Pass) -> bool:
    """Whether attention keeps the values as v_proj made them, rather than a copy."""
    return not (how.short or how.expanded or _pads(widths))


def _attention(widths: LayerWidths, how: Pass, shapes: ModelShapes) -> int:
    """Numbers per token that attention keeps: queries, keys, values and output, which o_proj reads."""
    qk, v = widths.qk_dim, widths.v_dim
    padded = _pads(widths)
    if padded:
        qk = v = -(-max(qk, v) // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE
    readers = widths.heads if how.capped or (how.expanded and not how.short) else widths.kv_heads
    numbers = (widths.heads + readers) * (qk + v)
    if how.capped:
        # What tanh gives, probabilities in float32, and what the product with the values reads of them.
        narrow = 1 if how.product < _FLOAT else 0
        return numbers + widths.heads * how.capped * (1 + _FLOAT // how.product + narrow)
    if how.short:
        # o_proj reads a copy of the output, and the backward pass no other.
        numbers += widths.heads * (how.short + widths.v_dim - v)
    elif padded or how.apart:
        numbers += widths.heads * widths.v_dim  # the output in the layout that o_proj reads
    if family_of(shapes.config).qk_norm:
        numbers += (widths.heads + widths.kv_heads) * widths.qk_dim
    return numbers


def _per_row(widths: LayerWidths, how: Pass, shapes: ModelShapes) -> int:
    """Bytes of what is one float32 per token and head or norm."""
    family = family_of(shapes.config)
    count = sum((block.before is not None) + (block.after is not None) for block in family.blocks)
    count += 0 if how.short or how.capped else widths.heads
    if family.qk_norm:
        count += 2 if family.norms_all_heads else widths.heads + widths.kv_heads
    return _FLOAT * count


def kept_by_loss(
    scored: int,
    hidden: int,
    vocab: int,
    *,
    weight: int,
    product: int,
    on_host: bool,
    capped: bool = False,
) -> float:
    """Bytes of the chunked cross-entropy of so many scored tokens: logits of one chunk, states and their gradients, the
    head in the narrow dtype.

    weight, product: bytes of an entry of the weights and of the products. On a CUDA device the softmax takes twice the
    logits on top. A cap on logits keeps its derivative beside them.
    """
    rows = max(min(CHUNK_BYTES["cpu" if on_host else "cuda"] // (product * vocab), scored), 1)
    chunk = rows * vocab
    logits = chunk * product * (1 if on_host else 3)
    logits += chunk * product if capped else 0
    states = scored * hidden * weight * 2
    casts = vocab * hidden * product * 2 if product < weight else 0
    return logits + states + casts
