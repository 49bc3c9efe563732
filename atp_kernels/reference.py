"""The mathematics in unfused PyTorch: the definition every backend is held to.

Nothing here is tuned. Each function is the formula, differentiable by autograd, in whatever dtype it is given;
tests run it in float64 and compare the backends with it.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Groups = Sequence[tuple[int, Tensor]]
"""For each factor, the axis that is grouped (0 rows, 1 columns) and the group id of every row or column."""

PHILOX_ROUNDS = 7
"""The fewest that pass Crush (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2)."""

_UINT32 = 0xFFFFFFFF


class Dropout(NamedTuple):
    """Drops an element of a matrix [M, K] with probability p in [0, 1), by its position and a 64-bit seed alone."""

    p: float
    seed: int

    @property
    def threshold(self) -> int:
        """An element is kept when its random 32-bit word is at least this."""
        return int(self.p * 2**32)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by, before they are rounded to their dtype."""
        return 1 / (1 - self.p)

    @property
    def key(self) -> tuple[int, int]:
        """The seed's low and high 32 bits."""
        return self.seed & _UINT32, self.seed >> 32 & _UINT32


def dropout_of(p: float, seed: int | Tensor | None) -> Dropout | None:
    """Probability and seed as backends take them, None where nothing is dropped."""
    return Dropout(p, int(seed)) if p else None


def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    out_mask: Tensor | None = None,
    in_mask: Tensor | None = None,
    mask_lora: bool = False,
    bias: Tensor | None = None,
    lora_input: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """y = m_out * ((m_in * x) W^T + bias) + scaling * (lora_input A^T) B^T; `mask_lora` masks the sum.

    x [..., in], weight [out, in], lora_a [r, in], lora_b [out, r], out_mask [out], in_mask [in], bias [out];
    lora_input is x where it is not given, after `dropout` of x seen as a matrix.
    Source: arXiv 2412.14426, section 3; the masked sum is its decision step, the masked base path its LoRA step.
    """
    if dropout is not None:
        lora_input = dropped(x.reshape(-1, x.shape[-1]), dropout).view(x.shape)
    adapter_input = x if lora_input is None else lora_input
    if mask_lora:
        adapter_input = _masked(adapter_input, in_mask)
    base = _masked(x, in_mask) @ weight.T
    if bias is not None:
        base = base + bias
    adapter = scaling * (adapter_input @ lora_a.T @ lora_b.T)
    return _masked(base + adapter, out_mask) if mask_lora else _masked(base, out_mask) + adapter


class Projection(NamedTuple):
    """A linear with its LoRA factors: weight [out, in], lora_a [r, in], lora_b [out, r], bias [out]."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None


def masked_lora_swiglu(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    mask: Tensor | None = None,
    mask_lora: bool = False,
) -> Tensor:
    """down(act(gate(x)) * up(x)); the mask [channels] covers gate and up, without `mask_lora` the input of down too.

    Producers whose sums are masked leave zeros at the input of down: it needs no mask then.
    Source: Shazeer 2020, "GLU variants improve transformer"; masks: arXiv 2412.14426, section 3.
    """
    act = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}[activation]
    g, u = masked_lora_qkv(x, gate, up, masks=(mask, mask), mask_lora=mask_lora)
    weight, lora_a, lora_b, scaling, bias = down
    in_mask = None if mask_lora else mask
    return masked_lora_linear(act(g) * u, weight, lora_a, lora_b, scaling=scaling, in_mask=in_mask, bias=bias)


def masked_lora_qkv(
    x: Tensor, *linears: Projection, masks: Sequence[Tensor | None], mask_lora: bool = False
) -> tuple[Tensor, ...]:
    """Masked LoRA linears of one x, each with the mask of its outputs."""
    return tuple(
        masked_lora_linear(x, w, a, b, scaling=scaling, bias=bias, out_mask=mask, mask_lora=mask_lora)
        for (w, a, b, scaling, bias), mask in zip(linears, masks, strict=True)
    )


def dropped(values: Tensor, dropout: Dropout, first_row: int = 0) -> Tensor:
    """keep * values / (1 - p) for values [M, K], the rows from `first_row` on of a larger matrix.

    Element (m, k) is kept where word k % 4 of Philox-4x32-7 with counter (m, k // 4, 0, 0) is at least floor(p * 2^32).
    """
    rows, cols = values.shape
    m = torch.arange(first_row, first_row + rows, device=values.device).unsqueeze(1)
    quads = torch.arange(-(-cols // 4), device=values.device)
    zero = torch.zeros((), dtype=torch.int64, device=values.device)
    words = torch.stack(torch.broadcast_tensors(*philox((m, quads, zero, zero), dropout.key)), dim=2)
    keep = words.view(rows, 4 * quads.numel())[:, :cols] >= dropout.threshold
    return torch.where(keep, values * dropout.scale, 0)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = PHILOX_ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox-4x32 for each counter, all as int64 (Salmon et al. 2011, section 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap, which leaves all 64 bits of the unsigned product in place.
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (right >> 32 & _UINT32) ^ c1 ^ k0, right & _UINT32
        c2, c3 = (left >> 32 & _UINT32) ^ c3 ^ k1, left & _UINT32
        k0, k1 = k0 + 0x9E3779B9 & _UINT32, k1 + 0xBB67AE85 & _UINT32
    return c0, c1, c2, c3


def factor_norms(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of B's rows [out] and A's columns [in], accumulated in float32 or better."""
    return _wide(lora_b).square().sum(1), _wide(lora_a).square().sum(0)


def group_squares(factors: Sequence[Tensor], groups: Groups, n_groups: int) -> Tensor:
    """Sum of squares [n_groups] of each joint group over all factors that own a part of it."""
    dtype = torch.float64 if any(factor.dtype == torch.float64 for factor in factors) else torch.float32
    parts = [factor.to(dtype).square().sum(1 - axis) for factor, (axis, _) in zip(factors, groups, strict=True)]
    squares = torch.zeros(n_groups, dtype=dtype, device=factors[0].device)
    index = torch.cat([index for _, index in groups])
    if squares.is_cuda:
        # index_add_ is atomic on CUDA; index_put_ sorts first, so that the sum is the same every time.
        return squares.index_put_((index,), torch.cat(parts), accumulate=True)
    return squares.index_add_(0, index, torch.cat(parts))


def group_lasso(factors: Sequence[Tensor], groups: Groups, removed: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Sum over removed, non-empty groups of sqrt(sum of squares + eps) (arXiv 2412.14426, section 3)."""
    squares = group_squares(factors, groups, removed.numel())
    counted = removed & owned_groups(groups, removed)
    return torch.where(counted, (squares + eps).sqrt(), 0).sum()


def group_prox_(factors: Sequence[Tensor], groups: Groups, removed: Tensor, threshold: float | Tensor) -> None:
    """group <- group * max(0, 1 - threshold / ||group||) in place, for removed groups; exact zeros at the bottom."""
    with torch.no_grad():
        norms = group_squares(factors, groups, removed.numel()).sqrt()
        # Asked this way round a NaN norm stays visible as NaN instead of becoming a clean zero.
        shrunk = torch.where(norms <= threshold, 0, 1 - threshold / norms)
        scale = torch.where(removed, shrunk, 1)
        for factor, (axis, index) in zip(factors, groups, strict=True):
            by_group = scale[index].unsqueeze(1 - axis)
            factor.copy_(torch.where(by_group == 0, 0, factor * by_group))


def compact(weight: Tensor, rows: Tensor | None = None, cols: Tensor | None = None, pad_to: int = 1) -> Tensor:
    """The kept rows and columns of `weight`, each gathered side zero-padded to a multiple of `pad_to`."""
    kept = weight if rows is None else weight[rows]
    kept = kept if cols is None else kept[:, cols]
    n_rows = kept.shape[0] if rows is None else round_up(kept.shape[0], pad_to)
    n_cols = kept.shape[1] if cols is None else round_up(kept.shape[1], pad_to)
    padded = weight.new_zeros(n_rows, n_cols)
    padded[: kept.shape[0], : kept.shape[1]] = kept
    return padded


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row, whose gradient softmax(logits) - onehot(target) replaces the logits."""
    index = targets.unsqueeze(1)
    log_p = torch.log_softmax(_wide(logits), dim=1)
    losses = -log_p.gather(1, index).squeeze(1)
    logits.copy_(log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0)))
    return losses


def owned_groups(groups: Groups, removed: Tensor) -> Tensor:
    """bool [n_groups]: which groups own at least one row or column of a factor."""
    return torch.zeros_like(removed).index_fill_(0, torch.cat([index for _, index in groups]).long(), True)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else (values * mask).to(values.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
