"""Triton: whether it runs here, on which devices and dtypes; what the `triton` backends of all rooms share."""

from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from atp_kernels.call import Call, refused_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU: what Triton supports and where bfloat16 has tensor cores."""
AMD_STAGES = 2
"""Of a loop on AMD at most: more take more than its 64 KB of shared memory, and registers."""
PRODUCTS = ("masked_lora_linear", "masked_lora_qkv")
"""Operations whose kernels are products."""
_INT32_LIMIT = 2**31
AVAILABLE = find_spec("triton") is not None
REASON = None if AVAILABLE else "the triton package is not installed; run pip install triton"
INTERPRETED = False
"""Whether TRITON_INTERPRET=1 makes kernels run on a CPU."""
VERSION: str | None = None

if AVAILABLE:
    try:
        import triton
    except ModuleNotFoundError as error:  # the interpreter needs numpy
        AVAILABLE = False
        REASON = f"triton does not load without {error.name}; run pip install {error.name}"

if AVAILABLE:
    VERSION = triton.__version__

    @triton.jit
    def _count(times):
        for _ in range(times):
            pass

    INTERPRETED = not isinstance(_count, triton.runtime.JITFunction)
    if INTERPRETED:
        try:
            _count[(1,)](1)
        except Exception as error:  # Triton 3.6 makes numbers of arrays as NumPy 2.4 no longer allows it
            AVAILABLE = False
            REASON = (
                f"the interpreter of Triton {triton.__version__} fails with NumPy {version('numpy')} ({error}); "
                "install a newer triton or an older numpy, or unset TRITON_INTERPRET"
            )
    elif not torch.cuda.is_available():
        AVAILABLE = False
        REASON = "there is no CUDA device; TRITON_INTERPRET=1, set before the start, emulates one on a CPU"


def misfit(device: torch.device) -> str | None:
    """Why Triton, where it is there, does not run on this device."""
    if INTERPRETED:
        return None
    if device.type == "cuda":
        return _misfit_capability(device)
    return f"the triton backend runs on cuda, not on {device.type} (TRITON_INTERPRET=1 emulates it on a cpu)"


def _misfit_capability(device: torch.device) -> str | None:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    own, oldest = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
    return f"the triton backend needs CUDA capability {oldest} and {device} is of {own}"


def lacks_registers(device: torch.device) -> str | None:
    """Why the tiles of products do not suit an AMD GPU whose waves have 32 lanes (RDNA): they spill."""
    if INTERPRETED or torch.version.hip is None or not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_properties(device).warp_size != 32:
        return None
    return f"the triton backend's tiles of products do not fit the registers of {device}, whose waves have 32 lanes"


def takes_tf32(device: torch.device) -> bool:
    """Whether Triton makes TF32 products there: of AMD's GPUs gfx942 has them, and kernels of others do not compile."""
    if INTERPRETED or torch.version.hip is None:
        return True
    return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")


def refuses(call: Call) -> str | None:
    """Why no Triton kernel takes a call on this device or of this dtype."""
    reason = refused_dtype("triton", call.dtype, DTYPES) or misfit(call.device)
    return reason or (lacks_registers(call.device) if call.op in PRODUCTS else None)


def passes_int32(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of the tensors can pass int32."""
    given = [tensor for tensor in tensors if tensor is not None]
    return any(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= _INT32_LIMIT for t in given)


def stages(wanted: int) -> int:
    """How many iterations of a loop's loads a kernel keeps on their way here."""
    return wanted if torch.version.hip is None else min(wanted, AMD_STAGES)
