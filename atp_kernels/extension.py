"""The optional extension atp_kernels._C: loaded, or why it is missing; what the `native` backends of all rooms share.

Results of its operations do not depend on the number of threads or on the processor's instruction set. They are
numerics only: they record no gradient.
"""

import importlib
import importlib.metadata
import re
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from atp_kernels.call import Call, refused_dtype

DTYPES = (torch.float32, torch.bfloat16)

_PACKAGE = Path(__file__).resolve().parent
# Written by setup.py into a package that it builds without the extension.
_NOTE = "_C.missing"
_IN_PLACE = "`python setup.py build_ext --inplace` in the source tree"


def load() -> tuple[ModuleType | None, str | None]:
    """(the extension, None) or (None, why it is missing and what brings it).

    Warns where a source tree without it stands before an installed copy that has it: nobody means that.
    """
    try:
        return importlib.import_module("atp_kernels._C"), None
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        return None, f"the extension atp_kernels._C does not load ({error}); reinstall atp-kernels to rebuild it"
    if not _is_source():
        return None, (
            f"the extension atp_kernels._C was not built{_noted()}; with torch>=2.10 and a C++ compiler at hand, "
            "reinstall with `ATP_BUILD=1 pip install --no-build-isolation` to build it or see why not"
        )
    tree = f"the source tree {_PACKAGE.parent} is in use, and the extension atp_kernels._C was not built there"
    installed = _installed_copy()
    if installed is None:
        return None, f"{tree}; build it with {_IN_PLACE}"
    reason = f"{tree}, while the copy in {installed} has it; run from another folder, or build it with {_IN_PLACE}"
    warnings.warn(f"Slow kernels: {reason}.", RuntimeWarning, stacklevel=2)
    return None, reason


def _is_source() -> bool:
    return (_PACKAGE.parent / "csrc").is_dir() and (_PACKAGE.parent / "setup.py").is_file()


def _noted() -> str:
    note = _PACKAGE / _NOTE
    return f", since {note.read_text(encoding='utf-8').strip()}" if note.is_file() else ""


def _installed_copy() -> Path | None:
    """The folder in which another copy of the package has the extension."""
    for distribution in importlib.metadata.distributions(name="atp-kernels"):
        package = Path(str(distribution.locate_file("atp_kernels"))).resolve()
        if package != _PACKAGE and any((package / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
            return package.parent
    return None


_extension, REASON = load()
AVAILABLE = _extension is not None
ops = torch.ops.atp_kernels_native
"""The extension's operators."""


def build_info() -> dict[str, Any]:
    """What the extension was built with, and the instruction set it picked on this processor.

    Keys: compiler, isa_compiled, isa, cuda_archs, stable_abi_target (the oldest torch it runs under), torch_built_with.
    Raises RuntimeError where the extension is missing.
    """
    if _extension is None:
        raise RuntimeError(f"No build information: {REASON}.")
    return _extension.build_info()


def binary() -> Path | None:
    """The file that the extension was loaded from; None where it is missing."""
    return None if _extension is None or _extension.__file__ is None else Path(_extension.__file__)


def misfit(device: torch.device) -> str | None:
    """Why the extension, where it is there, has no code for this device."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:  # torch calls AMD's devices cuda too
        return f"the native backend has no code for {'ROCm' if device.type == 'cuda' else device.type}"
    archs = build_info()["cuda_archs"]
    if not archs:
        return "the native backend was built without support for cuda; reinstall with ATP_BUILD_CUDA=1"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if any(_runs_on(arch, capability) for arch in archs):
        return None
    own = ".".join(map(str, capability))
    return (
        f"the native backend was built for CUDA {', '.join(archs)} and {device} is of capability {own}; "
        f"reinstall with TORCH_CUDA_ARCH_LIST={own}"
    )


def refuses(call: Call, *, cuda: bool = False, dtypes: Sequence[torch.dtype] = DTYPES) -> str | None:
    """Why the extension does not take a call on this device or of this dtype; `cuda`: it has a kernel there too."""
    problem = refused_dtype("native", call.dtype, dtypes)
    if problem is None and call.device.type != "cpu" and not cuda:
        return f"the native backend has {call.op} for cpu only"
    return problem or misfit(call.device)


def on_device(operator: Any, *arguments: Any) -> Any:
    """Call an operator; on CUDA, on the device of its tensors and on that device's current stream."""
    device = next(a.device for a in reversed(arguments) if isinstance(a, Tensor))
    if device.type != "cuda":
        return operator(*arguments)
    with torch.cuda.device(device):
        return operator(*arguments, stream=torch.cuda.current_stream().cuda_stream)


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
