"""Dropout of an adapter's input, drawn from position and seed, so that backward draws it again."""

import torch
from torch import Tensor

from atp_kernels.checks import check_dropout, is_capturing
from atp_kernels.dropout import op
from atp_kernels.kinds import typed


@typed
def new_seed(x: Tensor) -> Tensor:
    """A seed for a call whose adapter reads x: a 0-d int64 tensor from torch's generator, on the CPU.

    While a CUDA graph is captured it is on x's device, from the generator of that, so that each replay draws another.

    >>> new_seed(torch.ones(2, 3)).dtype
    torch.int64
    """
    device = x.device if is_capturing(x.device) else "cpu"
    return torch.randint(2**62, (), dtype=torch.int64, device=device)


@typed
def lora_dropout(x: Tensor, p: float, seed: int | Tensor | None, *, backend: str = "auto") -> Tensor:
    """keep * x / (1 - p): what `masked_lora_linear` with this dropout and seed hands to its adapter, on its own.

    x [..., K], floating; p in [0, 1); `keep` and `seed` as in `masked_lora_linear`. Returns a tensor like x.
    Differentiable: the gradient is the same dropout of the gradient, drawn again, and nothing of x or keep is stored.
    Raises ValueError for a wrong dtype, p or seed and RuntimeError for a named backend that cannot take the call.
    Source: Srivastava et al. 2014; Philox: Salmon et al. 2011.

    >>> x = torch.ones(2, 3)
    >>> dropped = lora_dropout(x, 0.5, seed=7)
    >>> dropped.unique()
    tensor([0., 2.])
    >>> torch.equal(dropped, lora_dropout(x, 0.5, seed=7))  # the same elements each time
    True
    """
    check_dropout(x, p, seed, None)  # which refuses a missing seed
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}: give a floating tensor [..., K].")
    return x if seed is None or not p else op.dropped(x, float(p), seed, backend)
