"""Which backend takes a call, and why.

A backend is a module that implements some of the functions of `backends.reference` under the same names, and says
with `AVAILABLE` and `REASON` whether it can run here. `ADDMM_CHAIN` says that a linear without masks and dropout is the
calls of `reference` there too, which `ops.plain` then makes at less cost. Adding one touches `_MODULES` and
`_preference`.
"""

import importlib
import os
import re
from collections.abc import Mapping, MutableMapping
from functools import cache
from types import ModuleType

import torch

ENVIRONMENT = "ATP_KERNELS_BACKEND"

_MODULES = {
    "reference": "atp_kernels.backends.reference",
    "triton": "atp_kernels.backends.triton",
    "native": "atp_kernels.backends.native",
}
_ENTRY = {
    "masked_lora_linear": "masked_lora_linear_forward",
    "masked_lora_linear_with_norms": "masked_lora_linear_forward",
    "masked_lora_swiglu": "masked_lora_linear_forward",
    "masked_lora_qkv": "masked_lora_linear_forward",
    "kept_lora_linear": "kept_lora_linear_forward",
    "lora_dropout": "dropped",
    "group_lasso": "group_lasso_forward",
    "group_lasso_grad_": "group_lasso_grad_",
    "group_prox_": "group_prox_",
    "compact": "compact",
    "cross_entropy_": "cross_entropy_",
    "rms_norm": "rms_norm_forward",
}
_DTYPES = {
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "native": (torch.float32, torch.bfloat16),
}
# What the native backend has for the CPU alone.
_CPU_NATIVE = (
    "masked_lora_linear_forward",
    "kept_lora_linear_forward",
    "dropped",
    "cross_entropy_",
    "rms_norm_forward",
)
OPS = tuple(_ENTRY)
NAMES = ("auto", *_MODULES)


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend's name, with None where it can run here, or on this device, and else the reason why not."""
    found = {name: _load(name) for name in _MODULES}
    if device is None:
        return {name: reason for name, (_, reason) in found.items()}
    place = torch.device(device)
    return {name: reason or _misfit(name, module, place) for name, (module, reason) in found.items()}


def select(
    op: str, device: torch.device, dtype: torch.dtype, backend: str = "auto", *, plain: bool = False
) -> tuple[ModuleType, str, str]:
    """Return (module, backend name, reason) for one call of `op` on tensors of this device and dtype.

    `plain` says of a masked LoRA linear that it has neither masks nor dropout.
    Raises ValueError for an unknown name, RuntimeError for a named backend that cannot take the call.
    """
    override = os.environ[ENVIRONMENT] if _RAW_NAME in _RAW_VARIABLES else ""
    return _select(op, device, dtype, backend, override, plain)


def _raw(environ: MutableMapping[str, str]) -> tuple[Mapping, str | bytes]:
    """The dict behind os.environ and the name of `ENVIRONMENT` there; `environ` itself where there is no such dict.

    os.environ finds a missing name by way of an exception, which took 4 us of an eager call.
    """
    if hasattr(environ, "_data") and hasattr(environ, "encodekey"):
        return environ._data, environ.encodekey(ENVIRONMENT)
    return environ, ENVIRONMENT


_RAW_VARIABLES, _RAW_NAME = _raw(os.environ)


@cache
def _select(
    op: str, place: torch.device, dtype: torch.dtype, backend: str, override: str, plain: bool
) -> tuple[ModuleType, str, str]:
    device = place.type
    if op not in _ENTRY:
        raise ValueError(f"unknown operation {op!r}: use one of {', '.join(OPS)}.")
    origin = "backend="
    if backend == "auto" and override:
        backend, origin = override, f"{ENVIRONMENT}="
    if backend not in NAMES:
        raise ValueError(f"{origin}{backend!r} is not a backend: use one of {', '.join(NAMES)}.")
    if backend != "auto":
        problem = _problem(backend, op, place, dtype)
        if problem:
            raise RuntimeError(f"{origin}{backend!r} cannot take {op}: {problem}; use backend='auto' to let it choose.")
        return _load(backend)[0], backend, f"{origin}{backend!r} names it"
    if plain and device == "cuda":
        # A Triton GEMM reaches about 0.87 of the vendor's on H100, which costs more than an addmm_ of the adapter.
        return _load("reference")[0], "reference", "no mask and no dropout, so nothing to fuse beats the addmm_ chain"
    passed_over = []
    for name in _preference(op, device):
        problem = _problem(name, op, place, dtype)
        if problem is None:
            why = f"first choice on {device}" if not passed_over else "; ".join(passed_over)
            return _load(name)[0], name, why
        passed_over.append(f"{name}: {problem}")
    raise RuntimeError(f"no backend takes {op} on {device}: {'; '.join(passed_over)}.")


def _preference(op: str, device: str) -> tuple[str, ...]:
    if op == "kept_lora_linear" and device != "cpu":
        # Its products are the vendor's in every backend; what a CPU does in C++ around them is ATen's elsewhere.
        return ("reference",)
    if device == "cuda" and _ENTRY[op] in _CPU_NATIVE:
        return ("triton", "reference")
    if device == "cuda":
        return ("native", "reference") if op == "compact" else ("native", "triton", "reference")
    if device == "cpu":
        # Both call the same vendor GEMM; around it, native masks and sums took 0.13 to 1.0 of the time, without a mask
        # there is nothing to do for either (768 x 576 to 768 x 1536, two threads).
        return ("native", "reference")
    return ("reference",)


def _problem(name: str, op: str, place: torch.device, dtype: torch.dtype) -> str | None:
    module, reason = _load(name)
    if module is None:
        return reason
    if not hasattr(module, _ENTRY[op]):
        return f"the {name} backend does not implement {op}"
    if name in _DTYPES and dtype not in _DTYPES[name]:
        accepted = ", ".join(str(accepted).removeprefix("torch.") for accepted in _DTYPES[name])
        return f"the {name} backend takes {accepted}, not {str(dtype).removeprefix('torch.')}"
    if name == "native" and place.type != "cpu" and _ENTRY[op] in _CPU_NATIVE:
        return f"the native backend has {op} for cpu only"
    return _misfit(name, module, place)


def _misfit(name: str, module: ModuleType, place: torch.device) -> str | None:
    """Why a backend that can run here cannot run on this device, whatever the operation."""
    device = place.type
    if name == "triton" and device != "cuda" and not module.INTERPRETED:
        return f"the triton backend runs on cuda, not on {device} (TRITON_INTERPRET=1 emulates it on a cpu)"
    if name != "native" or device == "cpu":
        return None
    archs = module.build_info()["cuda_archs"] if device == "cuda" else []
    if not archs:
        return f"the native backend was built without support for {device}; reinstall with ATP_BUILD_CUDA=1 for cuda"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(place)
    if any(_runs_on(arch, capability) for arch in archs):
        return None
    own = ".".join(map(str, capability))
    return (
        f"the native backend was built for CUDA {', '.join(archs)} and {place} is of capability {own}; "
        f"reinstall with TORCH_CUDA_ARCH_LIST={own}"
    )


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for an entry of TORCH_CUDA_ARCH_LIST, such as 8.0, 9.0a, 10.0f or 8.0+PTX, runs on a device.

    A binary runs on its own version and later ones of its generation, one with an "a" on its own version alone. PTX is
    compiled for any later device, unless a letter ties it down as it does a binary.
    """
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
    if found is None:
        return False
    built, letter, ptx = (int(found[1]), int(found[2])), found[3], found[4]
    if letter == "a":
        return capability == built
    return capability >= built and (capability[0] == built[0] or (ptx is not None and not letter))


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        return None, f"the {name} backend cannot be imported here ({error}); reinstall atp-kernels with it"
    return (module, None) if module.AVAILABLE else (None, module.REASON)
