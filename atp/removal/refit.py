"""Refits the linears that end a block, so that the cut model's residual stream stays near that of the whole model.

After each block the cut stream lacks R = S_whole - S_cut; where a norm reads the outputs Y of the block, Y_cut lacks
R = Y_whole - Y_cut, each token in units of the size of its Y_whole. Ridge regression on calibration text adds
R^T X_k (X_k^T X_k + lambda D)^-1 to W_k, the kept columns of the linear that ends the block; D is the diagonal of
X_k^T X_k and a thousandth of its mean. Layers are refitted in order, each on the stream of the layers before it, cut
and refitted, so that later layers also make up for what earlier ones lost (docs/method.md section 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.families import Block, family_of
from atp.ground.errors import NotReached
from atp.lora.controller import MaskController
from atp.models.layers import (
    add_block,
    add_output,
    block_output,
    first_layer_inputs,
    reached,
    residual_multiplier,
    run_block,
)
from atp.processes import processes
from atp.processes.finite import is_finite
from atp.removal.certify import wider
from atp.removal.widen import ieee_products
from atp.sharding.shards import gathered, rows_of, store
from atp.spaces.space import MaskSpace, Structure
from atp_kernels import QuantizedWeight
from atp_kernels.quantized import dense

DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""What the refit chooses lambda from."""

HELD_OUT = 8
"""Every eighth batch chooses lambda, and where there are fewer the last one."""

_LEAST = 1e-3  # of the mean square of the kept inputs, what each is damped by at least
_FEW = 0.3  # the damping where there are too few batches to hold one out
_SMALLEST = 1e-12  # mean square of outputs, for those of a token that are all zero
TOKENS_AT_ONCE = 4096  # tokens in one product
_COLUMNS = 256  # of both sides of a product that lies on the diagonal of x^T x, at most

Back = Callable[[], Tensor]
"""Gives a tensor back that was put aside."""


def in_place(tensor: Tensor) -> Back:
    """Puts a tensor aside where it is."""
    return lambda: tensor


@torch.no_grad()
@ieee_products()
def refit(
    decoder: PreTrainedModel,
    controller: MaskController,
    space: MaskSpace,
    mask: Tensor,
    batches: Iterable[dict[str, Any]],
    *,
    damping: float | None = None,
    among: int | None = None,
    aside: Callable[[Tensor], Back] = in_place,
) -> dict[str, Tensor]:
    """Changes the base weights of the linears that end a block, from the first one that `mask` removes inputs of.

    mask: bool [space.size], True keeps. decoder: in evaluation mode, its linears masked LoRA layers; LoRA counts as
    part of the weight, and the whole model is the one without masks. batches: as `atp.data.collate` makes them; one
    with padded rows says in `text`, bool [batch, tokens], what to fit to. among: all processes call this, and `batches`
    are those of this one's `processes.shares` of so many; they fit together and end with the same weights. aside: puts
    away, for all batches, the hidden states of the whole model and of the cut one, their difference, and the inputs of
    one linear. damping: lambda; None chooses one of `DAMPINGS` for each linear on every eighth batch, and leaves a
    linear alone that none of them helps there.
    Columns of removed inputs stay as they are. A quantized weight that the fit changes becomes a floating one: rounding
    it to a few bits again would add their error to what was fitted. Clears the masks; kept slices are stale afterwards.
    A sharded model has one layer gathered at a time. In a space without such linears nothing changes. Returns the
    changed weights or their shards, not copied, by their names in the decoder. Raises `NotReached` when inputs,
    differences or fitted weights are not finite.
    """
    if not any(structure.reader for structure in space.structures):
        return {}
    started = ((*first_layer_inputs(decoder, batch), batch.get("text")) for batch in batches)
    cut, arguments, texts = map(list, zip(*((aside(x), *rest) for x, *rest in started), strict=True))
    total = len(cut) if among is None else among
    numbers = range(len(cut)) if among is None else range(processes.rank(), among, processes.count())
    cut, arguments, texts = cut[: len(numbers)], arguments[: len(numbers)], texts[: len(numbers)]
    whole = list(cut)
    advance = partial(_advance, aside=aside)
    changed = {}
    layers: Any = decoder.layers
    for index, layer in enumerate(layers):
        with gathered(layer) as shards:
            for block in family_of(cast(Any, decoder.config)).blocks:
                run = partial(run_block, layer, block)
                structure = space.read_by(index, block.module)
                controller.clear()
                # A block that is left out has no inputs to fit; later ones make up for it.
                if structure is None or structure.reader is None or _as_it_is(structure, mask):
                    advance(whole, arguments, run)
                    controller.set(mask, "sum")
                    advance(cut, arguments, run)
                    continue
                aims = whole
                if block.after is None:
                    advance(whole, arguments, run)
                else:
                    each = zip(whole, arguments, strict=True)
                    aims = [aside(block_output(layer, block, x(), given)) for x, given in each]
                    advance(whole, (aim() for aim in aims), partial(add_output, layer, block))
                controller.set(mask, "sum")
                name = f"{structure.reader}.base_layer.weight"
                linear: Any = layer.get_submodule(structure.reader)
                batch_by_batch = zip(numbers, aims, cut, arguments, texts, strict=True)
                pairs = _pairs(layer, linear, block, batch_by_batch, aside)
                del aims
                base = linear.get_base_layer()
                weight = dense(base.weight)
                kept = structure.kept_inputs(mask).to(weight.device)
                every = min(HELD_OUT, max(total, 2))
                where = f"layers.{index}.{structure.reader}"
                if _fit(where, weight, pairs, kept, damping, every=every, together=among is not None):
                    if isinstance(base.weight, QuantizedWeight):
                        base.weight = nn.Parameter(weight, requires_grad=False)
                    if name in shards:
                        store(shards[name], weight[rows_of(shards[name])])
                    changed[f"layers.{index}.{name}"] = shards.get(name, base.weight)
                advance(cut, pairs, partial(_end, layer, linear, block))
                del pairs  # before the next block makes its own
    controller.clear()
    return changed


def _as_it_is(structure: Structure, mask: Tensor) -> bool:
    """Whether the end of a block stays: where nothing is removed up to it, or nothing is left of it."""
    return bool(mask[: structure.span.stop].all()) or not mask[structure.span].any()


def _advance(
    states: list[Back],
    given: Iterable[Any],
    run: Callable[[Tensor, Any], Tensor],
    aside: Callable[[Tensor], Back],
) -> None:
    """Runs a block on the states of each batch, which take the place of those before, so that few are there twice."""
    for place, argument in enumerate(given):
        states[place] = aside(run(states[place](), argument))


class Pair(NamedTuple):
    """Of a batch: its number, the inputs of a linear, what is lost, and bool [batch, tokens], which rows are text."""

    number: int
    inputs: Back  # [..., inputs]
    lost: Back  # [..., outputs]
    text: Tensor | None = None  # None: all
    scale: Tensor | None = None  # [..., 1], by which a row counts; None: all by one

    def rows(self) -> tuple[Tensor, Tensor]:
        """Inputs and what is lost, [tokens, inputs] and [tokens, outputs], of text alone, scaled."""
        parts = (part() if self.scale is None else part() * self.scale for part in (self.inputs, self.lost))
        inputs, lost = (part.flatten(0, -2) if self.text is None else part[self.text] for part in parts)
        return inputs, lost


def _pairs(
    layer: nn.Module, linear: nn.Module, block: Block, batches: Iterable[Any], aside: Callable[[Tensor], Back]
) -> list[Pair]:
    """What the cut model has where `linear` ends a block, and what it lacks behind that.

    batches: of each its number, states of the whole model behind the block (its outputs where a norm reads them), those
    of the cut one before it, arguments of the block, and which rows are text.
    """
    pairs = []
    for number, aimed, before, given, text in batches:
        aim, x = aimed(), before()
        with reached(linear) as found:
            block_output(layer, block, x, given)
        read = found[0]
        if block.after is None:
            lost, scale = (aim - add_block(layer, x, linear(read))) / residual_multiplier(layer), None
        else:
            # The norm divides by the size of the output, so an error counts as a share of it.
            mean_square = aim.float().square().mean(-1, keepdim=True)
            lost, scale = aim - linear(read), mean_square.clamp_min(_SMALLEST).rsqrt().to(aim.dtype)
        pairs.append(Pair(number, aside(read), aside(lost), text, scale))
    return pairs


def _end(layer: nn.Module, linear: nn.Module, block: Block, x: Tensor, pair: Pair) -> Tensor:
    """The states of the cut model behind the block that `linear` ends."""
    return add_output(layer, block, x, linear(pair.inputs()))


def _fit(
    name: str,
    weight: Tensor,
    pairs: list[Pair],
    kept: Tensor,
    damping: float | None,
    *,
    every: int,
    together: bool,
) -> bool:
    """Adds the ridge solution to the kept columns, if it helps on the held-out batches; returns whether it did.

    every: each of so many batches is held out. together: the batches are this process's share, and all of them fit the
    same weight.
    """
    if not all(is_finite(tensor) for pair in pairs for tensor in pair.rows()):
        raise NotReached(
            f"the refit of {name} reads NaN or infinity on the calibration windows: use model.dtype=float32 and "
            "training.precision=float32, or decisions.refit_windows=0"
        )
    moments = partial(moments_of, weight=weight, kept=kept, together=together)
    held_out = [pair for pair in pairs if damping is None and (pair.number + 1) % every == 0]
    sums = moments([pair for pair in pairs if not any(pair is other for other in held_out)])
    trial = moments(held_out)
    if trial.batches:
        # Which lambda is best is plain in float32 too, at half the time.
        left, damping = min((trial.left(sums.ridge(candidate, torch.float32)), candidate) for candidate in DAMPINGS)
        helps = left < float(trial.lost)
        if together:
            # Rounding must not let one process fit what another leaves alone.
            damping, helps = processes.on_main(lambda: (damping, helps))
        if not helps:
            return False
        for one, other in zip(sums, trial, strict=True):
            one.add_(other)
    del trial
    added = sums.ridge(_FEW if damping is None else damping, torch.float64).T
    del sums
    if together:
        processes.broadcast_(added)
    fitted = weight[:, kept].double() + added
    weight[:, kept] = fitted.to(weight.dtype)  # rounded once, after the sum
    if not is_finite(weight):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise NotReached(
            f"the refit of {name} gives weights that {dtype} cannot hold: use {wider(dtype)}decisions.refit_windows=0"
        )
    return True


class Moments(NamedTuple):
    """Sums over tokens: products of kept inputs, their products with what is lost, and its squares.

    In float32, as they were added up, or in float64 where the weights are.
    """

    inputs: Tensor  # [kept, kept]
    cross: Tensor  # [kept, outputs]
    lost: Tensor  # float64, scalar
    batches: Tensor  # their number, float64, scalar

    def ridge(self, damping: float, dtype: torch.dtype) -> Tensor:
        """What to add to the weights of the kept inputs, `dtype` [kept, outputs].

        Each input is damped by a share of its own square: by one of their mean, a few large ones hold back all others.
        A thousandth of the mean keeps the weight of an input small that is zero in almost all tokens here. The damped
        matrix and the right-hand side exist once each, and what is solved takes their place.
        """
        damped, solved = self._damped(damping, dtype), self.cross.T.to(dtype, copy=True).T
        # A symmetric matrix is its own transpose, whose columns lie in one piece, as LAPACK wants them.
        factor, failed = damped.T, torch.empty((), dtype=torch.int32, device=damped.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if failed:  # by rounding, where inputs depend on one another: the general solver does without a root
            return torch.linalg.solve(self._damped(damping, dtype), self.cross.to(dtype))
        torch.linalg.solve_triangular(factor, solved, upper=False, out=solved)
        torch.linalg.solve_triangular(factor.T, solved, upper=True, out=solved)
        return solved

    def _damped(self, damping: float, dtype: torch.dtype) -> Tensor:
        damped = self.inputs.to(dtype, copy=True)
        squares = damped.diagonal().clone()
        smallest = torch.finfo(torch.float32).tiny  # where all inputs are zero the system would be singular
        damped.diagonal().add_((damping * (squares + _LEAST * squares.mean())).clamp_min(smallest))
        return damped

    def left(self, added: Tensor) -> float:
        """The squares of what is still lost when this is added to the weights, in the dtype of `added`."""
        inputs, cross = self.inputs.to(added.dtype), self.cross.to(added.dtype)
        products = (inputs @ added).sub_(cross, alpha=2)
        return float(self.lost + products.mul_(added).sum())


def moments_of(pairs: list[Pair], *, weight: Tensor, kept: Tensor, together: bool) -> Moments:
    """The moments of inputs and what is lost, added up batch by batch in float32 or wider.

    together: summed over the processes.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    count = int(kept.sum())
    products, cross = weight.new_zeros(count, count, dtype=wide), weight.new_zeros(count, len(weight), dtype=wide)
    square = weight.new_zeros((), dtype=torch.float64)
    for pair in pairs:
        with torch.autocast(weight.device.type, enabled=False):
            inputs, lost = (rows.split(TOKENS_AT_ONCE) for rows in pair.rows())
            for read, lack in zip(inputs, lost, strict=True):
                x, y = read[:, kept].to(wide), lack.to(wide)
                _add_gram(products, x)
                cross.addmm_(x.T, y)
                square += y.square().sum()
    _mirror_(products)
    found = Moments(products, cross, square, square.new_tensor(len(pairs)))
    if together:
        for part in found:
            processes.sum_(part)
    return found


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Adds x^T x to `total`, which is symmetric, on its diagonal and above: up to half of the products are spared."""
    half = x.shape[1] // 2
    if x.shape[1] <= _COLUMNS:
        total.addmm_(x.T, x)
        return
    left, right = x[:, :half], x[:, half:]
    _add_gram(total[:half, :half], left)
    _add_gram(total[half:, half:], right)
    total[:half, half:].addmm_(left.T, right)


def _mirror_(matrix: Tensor) -> None:
    """Copies what lies above the diagonal below it, in place."""
    for start in range(0, len(matrix), _COLUMNS):
        end = min(start + _COLUMNS, len(matrix))
        corner = matrix[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[end:, start:end] = matrix[start:end, end:].T
