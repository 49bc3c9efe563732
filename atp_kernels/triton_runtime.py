"""Triton: whether it runs here, on which devices and dtypes; what the `triton` backends of all rooms share."""

from importlib.util import find_spec

import torch
from torch import Tensor

from atp_kernels.call import Call, refused_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INT32_LIMIT = 2**31
AVAILABLE = find_spec("triton") is not None
REASON = None if AVAILABLE else "the triton package is not installed; run pip install triton"
INTERPRETED = False
"""Whether TRITON_INTERPRET=1 makes kernels run on a CPU."""

if AVAILABLE:
    import triton

    @triton.jit
    def _nothing():
        pass

    INTERPRETED = not isinstance(_nothing, triton.runtime.JITFunction)
    if not INTERPRETED and not torch.cuda.is_available():
        AVAILABLE = False
        REASON = "there is no CUDA device; TRITON_INTERPRET=1, set before the start, emulates one on a CPU"


def misfit(device: torch.device) -> str | None:
    """Why Triton, where it is there, does not run on this device."""
    if device.type == "cuda" or INTERPRETED:
        return None
    return f"the triton backend runs on cuda, not on {device.type} (TRITON_INTERPRET=1 emulates it on a cpu)"


def refuses(call: Call) -> str | None:
    """Why no Triton kernel takes a call on this device or of this dtype."""
    return refused_dtype("triton", call.dtype, DTYPES) or misfit(call.device)


def passes_int32(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of the tensors can pass int32."""
    given = [tensor for tensor in tensors if tensor is not None]
    return any(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= _INT32_LIMIT for t in given)
