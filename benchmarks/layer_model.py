"""The kernels of a training step as a list: operations, bytes and launches, by phase and by way of computing them.

One description of a decoder layer (`_layer`) serves all ways. They differ in how a linear is computed (`kept_linear`,
`masked_triton`, `plain`, `unfused`), in whether norms, SwiGLU and RoPE are one kernel each way, and in what an open
step does for its saliency (`_observed`). Every kernel counts its operands once from memory and its results once to it.
What is as large as a vector or a factor is left out of the bytes where it lies beside activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from atp.families import Linear
from atp.plan.cost import ATTENTION_BACKWARD, attention
from atp.plan.shapes import LayerWidths, ModelShapes
from atp.training.cross_entropy import CHUNK_BYTES

PHASES = ("open", "decision", "search", "tune")
WAYS = ("ours", "unfused", "dense")
ROWS = ("products", "adapter and masks", "attention", "norms", "SwiGLU", "RoPE", "residual", "head, loss", "optimizer")
_READERS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
"""The linears of a layer that read one tensor."""
_WIDE = 4  # bytes of float32
_CONCATENATED = 128  # tensors that torch concatenates in one launch
CAUSAL = 0.5  # of the squares that `attention` counts: kernels skip what no token sees
_ROTARY = (10, 15)  # tensors of the size of q and k that eager RoPE reads and writes, forward and backward
_ROTARY_CALLS = (10, 18)


@dataclass(frozen=True)
class Kernel:
    """Calls of one kind, all of which the figures are of. row: where a table adds them up."""

    row: str
    flops: float
    bytes: float
    launches: int = 1


@dataclass(frozen=True)
class Step:
    """What all kernels of a step depend on.

    tokens: rows of all activations, in windows of `length`. item: bytes of an element (2 for bfloat16). phase: one of
    `PHASES`, or `whole` for the tune step of the model that was not cut. way: one of `WAYS`. on_gpu: where attention is
    fused and linears share their input. sharded: over processes, whose layers keep transformers' forward.
    """

    shapes: ModelShapes
    tokens: int
    length: int
    rank: int
    item: int
    phase: str
    way: str
    on_gpu: bool = True
    sharded: bool = False

    @property
    def widths(self) -> LayerWidths:
        """The layer that the step computes with, the first of layers that are alike: cut in our tune step alone."""
        cut = self.phase == "tune" and self.way != "dense"
        return (self.shapes.kept if cut else self.shapes.whole)[0]

    @property
    def learns(self) -> bool:
        """Whether the adapter has gradients."""
        return self.phase != "decision"

    @property
    def fused(self) -> bool:
        """Whether norms and SwiGLU are one kernel each way, and RoPE, but for ours on a CPU."""
        return self.way != "unfused"

    @property
    def joins(self) -> bool:
        """Whether the residual connection after attention and the norm after it are one kernel each way."""
        return self.way == "ours" and self.on_gpu and not self.sharded

    @property
    def casts_at_once(self) -> bool:
        """Whether the flat adapter is cast in one launch, and its gradients are collected in few."""
        return self.way == "ours" and self.on_gpu and not self.sharded and self.learns and self.item < _WIDE

    def shares(self, readers: tuple[str, ...]) -> bool:
        """Whether linears that read one tensor are one call: not under the soft masks of q, k and v."""
        return (
            self.way == "ours" and self.on_gpu and (self.phase != "decision" or not readers[0].startswith("self_attn."))
        )

    def product(self, rows: int, columns: int, inner: int, *, row: str = "products", again: int = 0) -> Kernel:
        """[rows, inner] times [inner, columns]; again: elements that are read or written beyond the operands."""
        moved = rows * inner + inner * columns + rows * columns + again
        return Kernel(row, 2.0 * rows * inner * columns, self.item * moved)

    def pass_(self, row: str, tensors: float, width: int, launches: int = 1) -> Kernel:
        """Element-wise calls that move so many tensors [tokens, width] in all."""
        return Kernel(row, 0.0, self.item * tensors * self.tokens * width, launches)


def kernels_of(step: Step) -> list[Kernel]:
    """All kernels of a step, in no order; those of a layer as often as there are layers.

    Left out: embeddings, the generator and the solution of its budget, what becomes of the saliency of a step, making
    slices, and what the host does.
    """
    times = step.shapes.layers
    layers = [Kernel(k.row, k.flops * times, k.bytes * times, k.launches * times) for k in _layer(step)]
    return [*layers, *_norm(step, 1), *_head(step), *(_optimizer(step) if step.learns else ())]


def _layer(step: Step) -> Iterator[Kernel]:
    """One decoder layer, forward and backward."""
    widths, hidden, tokens = step.widths, step.shapes.config.hidden_size, step.tokens
    for name, linear in widths.linears.items():
        yield from _linear(step, name, linear)
        yield from _factors(step, linear)
        yield from _observed(step, name, linear.out_features)
    yield from _norm(step, 1 if step.joins else 2)
    for readers in _READERS:
        if step.shares(readers):
            yield from _shared(step, [widths.linears[name] for name in readers])
        else:  # the sums of their gradients
            yield step.pass_("residual", 3 * (len(readers) - 1), hidden, len(readers) - 1)
    if step.joins:
        yield step.pass_("norms", 4 + 4, hidden, 2)
    added = 1 if step.joins else 2
    yield step.pass_("residual", 6 * added, hidden, 2 * added)  # residual additions, and of their gradients
    queries, keys = widths.heads * widths.qk_dim, widths.kv_heads * widths.qk_dim
    values, read = widths.heads * widths.v_dim, widths.kv_heads * widths.v_dim
    at_once = step.fused and (step.way == "dense" or step.on_gpu)
    moved, calls = ((2, 2), (1, 1)) if at_once else (_ROTARY, _ROTARY_CALLS)
    yield step.pass_("RoPE", sum(moved), queries + keys, sum(calls))
    flops = CAUSAL * attention(widths, step.length) * tokens
    read_once = step.item * tokens * (queries + values + keys + read)
    yield Kernel("attention", flops, read_once)
    yield Kernel("attention", ATTENTION_BACKWARD * flops, 2 * read_once, 3)
    yield from _gated(step, widths.linears["mlp.down_proj"].in_features)


def _linear(step: Step, name: str, linear: Linear) -> Iterator[Kernel]:
    axis = 1 if name.endswith(("o_proj", "down_proj")) else 0  # the side that a mask removes from
    shared = any(name in readers and step.shares(readers) for readers in _READERS)
    if step.way == "unfused":
        # A soft mask multiplies outputs alone; what down and o read arrives multiplied.
        masked = step.phase == "search" or (step.phase == "decision" and axis == 0)
        return unfused(step, linear, axis if masked else None)
    if step.way == "ours" and step.phase == "search":
        return kept_linear(step, linear, axis, step.shapes.kept[0].linears[name], shared)
    # Between gate and up the mask of their sums is applied, so those linears have none.
    if step.way == "ours" and step.phase == "decision" and name.startswith("self_attn.") and axis == 0:
        return masked_triton(step, linear)
    return plain(step, linear, shared)


def _factors(step: Step, linear: Linear) -> Iterator[Kernel]:
    """Float32 factors as the products read them and their gradients back, which ours adds to a flat gradient.

    Those that ours casts at once are no layer's.
    """
    if step.casts_at_once:
        return
    size, narrow = step.rank * (linear.in_features + linear.out_features), step.item
    if narrow < _WIDE:
        both = 2 if step.learns else 1
        yield Kernel("adapter and masks", 0.0, float(both * (narrow + _WIDE)) * size, 2 * both)
    if step.learns and step.way == "ours":
        yield Kernel("optimizer", 0.0, 3.0 * _WIDE * size, 2)


def _observed(step: Step, name: str, features: int) -> Iterator[Kernel]:
    """Sums of y * dL/dy over each sample of an open step: the saliency of what a linear of ours or of PyTorch makes.

    Those of channels are made in the backward pass of our SwiGLU.
    """
    gated = name in _READERS[1]
    if step.phase != "open" or step.way == "dense" or name not in (*_READERS[0], *_READERS[1]):
        return
    if step.way == "ours" and (gated or not step.on_gpu):
        if not gated:
            yield step.pass_("adapter and masks", 2, features)
        elif name == "mlp.gate_proj" and step.on_gpu:
            yield Kernel("adapter and masks", 0.0, 0.0, 2)  # the second stage, and to those of passes before
        return
    # In ATen: to float32, times the gradient, summed, and to what is there.
    narrow, wide = step.item, _WIDE
    cast = narrow < wide
    moved = (narrow + wide if cast else 0) + (wide + narrow + wide) + wide
    yield Kernel("adapter and masks", 0.0, float(moved) * step.tokens * features, 3 + cast)


def _shared(step: Step, linears: list[Linear]) -> Iterator[Kernel]:
    """What the adapters of linears of one input do with it as one, and the sum of dx in place."""
    m, k, r = step.tokens, linears[0].in_features, step.rank * len(linears)
    extra = "adapter and masks"
    yield step.product(m, r, k, row=extra)  # S
    yield step.product(m, k, r, row=extra)  # P A, to which every base adds its part of dx
    if step.learns:
        yield step.product(r, k, m, row=extra)  # dA
    yield Kernel(extra, 0.0, step.item * 4.0 * r * k, 2)  # the factors A as one, in each direction


def plain(step: Step, linear: Linear, shared: bool = False) -> Iterator[Kernel]:
    """Vendor products. In ours the base adds to the adapter's product, in the addmm idiom the adapter to the base's.

    shared: S, P A and dA are not its own.
    """
    m, n, k, r = step.tokens, linear.out_features, linear.in_features, step.rank
    extra, ours = "adapter and masks", step.way == "ours"
    if not shared:
        yield step.product(m, r, k, row=extra)  # S
        yield step.product(m, k, r, row=extra, again=0 if ours else m * k)
    yield step.product(m, n, k, again=m * n if ours else 0)
    yield step.product(m, n, r, row=extra, again=0 if ours else m * n)
    yield step.product(m, k, n, again=m * k if ours else 0)  # dx
    yield step.product(m, r, n, row=extra)  # P
    if step.learns:
        if not shared:
            yield step.product(r, k, m, row=extra)  # dA
        yield step.product(n, r, m, row=extra)  # dB


def kept_linear(step: Step, linear: Linear, axis: int, kept: Linear, shared: bool = False) -> Iterator[Kernel]:
    """A LoRA step on the kept slice, activations kept first: the base on the head, the adapter on the whole width."""
    m, n, k, r = step.tokens, linear.out_features, linear.in_features, step.rank
    rows, columns = kept.out_features, kept.in_features
    extra = "adapter and masks"
    if not shared:
        yield step.product(m, r, k, row=extra)  # S
        yield step.product(m, columns, r, row=extra)
        yield step.product(r, k, m, row=extra)  # dA
    yield step.product(m, rows, columns, again=m * rows)
    yield step.product(m, rows, r, row=extra)
    yield step.product(m, columns, rows, again=m * columns)  # dx
    yield step.product(m, r, n, row=extra)  # P
    tail = k - columns if axis else n - rows
    yield step.product(m, tail, r, row=extra)  # removed outputs, or removed positions of dx
    yield step.product(n, r, m, row=extra)  # dB
    # A factor brought into the order in each direction, and its gradient back.
    yield Kernel(extra, 0.0, step.item * 6.0 * r * (k if axis else n), 3)


def masked_triton(step: Step, linear: Linear) -> Iterator[Kernel]:
    """A decision step: mask and adapter in the product's epilogue, the un-masked sum saved for the mask's gradient."""
    m, n, k, r = step.tokens, linear.out_features, linear.in_features, step.rank
    extra = "adapter and masks"
    yield step.product(m, r, k, row=extra)  # S
    yield step.product(m, n, k + r, again=m * n)
    yield step.pass_(extra, 2, n, 2)  # the mask's gradient, in two stages
    yield step.product(m, r, n, row=extra)  # P
    yield step.product(m, k, n + r)  # dx


def unfused(step: Step, linear: Linear, axis: int | None) -> Iterator[Kernel]:
    """The linear in plain PyTorch operations, as in `linear/definition.py`: masks, scaling and sums on their own."""
    m, n, k, r = step.tokens, linear.out_features, linear.in_features, step.rank
    extra = "adapter and masks"
    yield step.product(m, n, k)
    yield step.product(m, k, n)  # dx
    yield step.product(m, r, k, row=extra)
    yield step.product(m, n, r, row=extra)
    yield step.product(m, r, n, row=extra)
    yield step.product(m, k, r, row=extra)
    yield step.pass_(extra, 2 + 2 + 3, n, 3)  # scaling, and of the gradient; the sum of both paths
    yield step.pass_(extra, 3, k)  # the sum of both paths' gradients
    if step.learns:
        yield step.product(r, k, m, row=extra)  # dA
        yield step.product(n, r, m, row=extra)  # dB
    if axis is None:
        return
    if step.learns:  # a bool mask
        yield step.pass_(extra, 2 + 2, k if axis else n, 2)
        return
    # A float32 mask of activations of `item` bytes: products are float32, casts lead back, and the mask has a gradient.
    narrow, wide = step.item, _WIDE
    cast = narrow + wide if narrow < wide else 0
    moved = (narrow + wide + cast) + (cast + 2 * wide + cast + 2 * wide + narrow + wide)
    yield Kernel(extra, 0.0, float(moved) * m * n, 4 + 3 * bool(cast))


def _norm(step: Step, count: int) -> Iterator[Kernel]:
    hidden = step.shapes.config.hidden_size
    if step.fused:
        yield step.pass_("norms", 5 * count, hidden, 2 * count)
        return
    # To float32, square, mean, scale, back, weight; backward: weight, scale, the root's mean, square, sum.
    narrow, wide = step.item, _WIDE
    cast = narrow + wide if narrow < wide else 0
    forward = cast + 2 * wide + wide + 2 * wide + cast + 2 * narrow
    backward = 2 * narrow + cast + (3 + 2 + 1) * wide + (2 + 2) * wide + (2 + 3 + 3) * wide + cast
    calls = 18 + 4 * bool(cast)
    yield Kernel("norms", 0.0, float(forward + backward) * step.tokens * hidden * count, calls * count)


def _gated(step: Step, channels: int) -> Iterator[Kernel]:
    if step.fused:
        again = 3 if step.learns else 0  # h, which is not saved, for the gradient of down's A
        yield step.pass_("SwiGLU", 3 + again + 5, channels, 2 + bool(again))
        if step.phase == "decision" and step.way == "ours":
            yield Kernel("SwiGLU", 0.0, 0.0)  # the second stage of the mask's gradient
    else:
        yield step.pass_("SwiGLU", 2 + 3 + 6 + 3, channels, 5)


def _head(step: Step) -> Iterator[Kernel]:
    """Logits, their loss and gradient, and that of the states: some tokens at a time where the loss is one kernel."""
    hidden, vocabulary = step.shapes.config.hidden_size, step.shapes.config.vocab_size
    row, chunks = "head, loss", 1
    if step.fused:
        budget = CHUNK_BYTES["cuda" if step.on_gpu else "cpu"]
        chunks = math.ceil(step.tokens / max(1, budget // (step.item * vocabulary)))
    again = (chunks - 1) * vocabulary * hidden
    for rows, columns, inner in ((step.tokens, vocabulary, hidden), (step.tokens, hidden, vocabulary)):
        product = step.product(rows, columns, inner, row=row, again=again)
        yield replace(product, launches=chunks)
    if step.fused:
        # Read twice and written once; the sum of losses, and the gradient copied to its place and scaled.
        yield step.pass_(row, 3, vocabulary, 3 * chunks)
        yield step.pass_(row, 2 + 2, hidden, chunks + 1)
        return
    # To float32, log softmax, its gradient at the targets, that of the logits, and back.
    narrow, wide = step.item, _WIDE
    cast = narrow + wide if narrow < wide else 0
    yield Kernel(
        row, 0.0, float(cast + 2 * wide + wide + 3 * wide + cast) * step.tokens * vocabulary, 4 + 2 * bool(cast)
    )


def _optimizer(step: Step) -> Iterator[Kernel]:
    """Norm and clip of the gradient, AdamW on float32 factors, zeros in a flat one, and in search the lasso's."""
    widths, layers = step.widths, step.shapes.layers
    parameters = widths.adapter(step.rank) * layers
    yield Kernel("optimizer", 0.0, _WIDE * parameters * (1.0 + 2 + 7), 8)
    if step.way == "ours":
        yield Kernel("optimizer", 0.0, 1.0 * _WIDE * parameters)
    if step.casts_at_once:
        factors = 2 * len(widths.linears) * layers
        yield Kernel("adapter and masks", 0.0, float(step.item + _WIDE) * parameters)
        yield Kernel("optimizer", 0.0, (3.0 * step.item + 2 * _WIDE) * parameters, -(-factors // _CONCATENATED) + 1)
    if step.phase == "search":
        yield Kernel("optimizer", 0.0, _WIDE * parameters * (1.0 + 3), 5)
