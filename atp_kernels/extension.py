"""The optional extension atp_kernels._C: loaded, or the reason why it is not there and what brings it."""

import importlib
import importlib.metadata
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

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
