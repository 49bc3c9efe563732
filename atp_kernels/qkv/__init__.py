"""The projections of attention: three masked LoRA linears of one x, without an operation of their own."""

from torch import Tensor

from atp_kernels.call import Operation, register
from atp_kernels.checks import check_dropout
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.kinds import typed
from atp_kernels.linear.op import BACKENDS, ORDER
from atp_kernels.linear.shared import shared_linears
from atp_kernels.projection import Projection, check_kept, project

register(Operation("masked_lora_qkv", "atp_kernels.linear", BACKENDS, ORDER, computed_by="masked_lora_linear"))


@typed
def masked_lora_qkv(
    x: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    *,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    mask_lora: bool = False,
    kept: tuple[KeptSlice, KeptSlice, KeptSlice] | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections of attention, each a masked LoRA linear of x.

    x [..., in]; weights [out_q, in], [out_k, in], [out_v, in]; factors and dtypes as in `masked_lora_linear`. masks
    [out_q], [out_k], [out_v]: bool or floating, on the outputs, as `mask_lora` says there. kept: the slices of q, k and
    v instead of masks; their weights and biases are those that count. `dropout` and `seed` as in `masked_lora_linear`,
    once for what the three adapters read; PEFT draws for each linear, and each of them sees the same distribution here.
    Returns q [..., out_q], k [..., out_k] and
    v [..., out_v]. Differentiable once in every floating input that requires it. Errors as in `masked_lora_linear` and
    `kept_lora_linear`. Source: arXiv 2412.14426, section 3.

    >>> q, k, v = (Projection(torch.ones(n, 3), torch.ones(1, 3), torch.ones(n, 1), 0.5) for n in (4, 2, 2))
    >>> [tuple(result.shape) for result in masked_lora_qkv(torch.ones(5, 3), q, k, v)]
    [(5, 4), (5, 2), (5, 2)]
    """
    if len(masks) != 3:
        raise ValueError(f"masks has {len(masks)} of three: give one for each linear, or None.")
    check_kept(kept, masks, mask_lora)
    if dropout != 0:
        check_dropout(x, dropout, seed, None)
    if all(mask is None for mask in masks):
        together = shared_linears(x, (q, k, v), kept, backend, float(dropout), seed)
        if together is not None:
            q_out, k_out, v_out = together
            return q_out, k_out, v_out
    slices = kept or (None, None, None)
    q_out, k_out, v_out = (
        project(x, linear, slice_, out_mask=mask, mask_lora=mask_lora, dropout=dropout, seed=seed, backend=backend)
        for linear, slice_, mask in zip((q, k, v), slices, masks, strict=True)
    )
    return q_out, k_out, v_out
