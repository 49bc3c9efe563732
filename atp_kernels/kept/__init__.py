"""The LoRA step while searching: hard masks on the base path at the cost of the kept slice of the base weight.

With R, C the kept outputs and inputs (`KeptSlice` gathers W_k = W[R, C] once per decision) and spread the inverse of a
gather, zero at removed positions: y = spread_R(x[:, C] W_k^T + bias[R]) + S B^T, S = scaling * lora_input A^T, and with
G = dL/dy, P = scaling * G B: dx = spread_C(G[:, R] W_k), dB = G^T S, dA = P^T lora_input, d lora_input = P A (added to
dx where LoRA reads x). Where a side lies kept first, spread and gather are plain slices of columns.
"""

from torch import Tensor

from atp_kernels.checks import check_dropout
from atp_kernels.kept import op
from atp_kernels.kept.forms import taken
from atp_kernels.kept.operands import prepare
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.kinds import typed


@typed
def kept_lora_linear(
    x: Tensor,
    kept: KeptSlice,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    lora_input: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`masked_lora_linear` with the hard masks of a `KeptSlice` on the base path, at the cost of the kept slice.

    x [..., in]; lora_a [r, in]; lora_b [out, r]; lora_input like x (default x). Returns [..., out] in the dtype of x,
    which is the weight's; the factors and lora_input are cast to it. Under autocast all are cast to the autocast dtype.
    Where a mask of the slice is a `KeptFirst`, x and lora_input, or the result, lie in its order; the factors and their
    gradients never do. `dropout` and `seed` make lora_input from x, as in `masked_lora_linear`, by positions in the
    order in which x lies. Differentiable once in x, lora_a, lora_b and lora_input, deterministic, and S [M, r] and x or
    the given lora_input are all that is saved: dropout is drawn again. Each call takes and dequantises the slice of a
    `QuantizedWeight`, and its backward pass does so again. Under torch.compile the slice must hold its weight already,
    and the compiler decides what is saved. Raises ValueError for wrong shapes, dtypes, devices or dropout, RuntimeError
    for a named backend that cannot take the call. Source: arXiv 2412.14426, section 3 (LoRA step).

    >>> kept = KeptSlice(torch.ones(4, 3), out_mask=torch.tensor([True, True, False, False]))
    >>> kept_lora_linear(torch.ones(2, 3), kept, torch.ones(1, 3), torch.ones(4, 1), scaling=0.5)[0]
    tensor([4.5000, 4.5000, 1.5000, 1.5000])
    """
    if dropout != 0:
        check_dropout(x, dropout, seed, lora_input)
    x, kept, lora_a, lora_b, lora_input = prepare(x, kept, lora_a, lora_b, lora_input)
    kept, module = taken(kept, x, lora_a.shape[0], backend)
    drawn = float(dropout), seed
    return op.kept_linear(x, kept, lora_a, lora_b, lora_input, float(scaling), backend, module, *drawn)
