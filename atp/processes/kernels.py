"""Whether the kernels are right on this GPU: asked once, before a run computes anything by them."""

from __future__ import annotations

import warnings

from atp.ground import progress
from atp.processes import processes
from atp_kernels import call
from atp_kernels.selftest import Outcome, Untested, outcomes, taken_over

_tested: set[str] = set()  # devices of this process


def check_once() -> None:
    """Makes every process go by what the main one finds out about the kernels of its GPU, or knows from before.

    An operation that fails there is computed by plain PyTorch, in all processes alike, and a warning names it.
    """
    device = processes.device()
    # Not on a CPU: nothing is compiled for the machine that runs there. The extension has one code for each set of
    # instructions, tested where it is built, and a run of a minute would wait ten seconds to see that again.
    if device.type != "cuda" or str(device) in _tested:
        return
    _tested.add(str(device))
    progress.begin("testing the kernels on this GPU")
    found = processes.on_main(_found)
    taken_over(found, device, told=processes.is_main())


def _found() -> dict[str, Outcome]:
    if call.override():
        return {}  # nobody takes another backend than the one that the user names
    device = processes.device()
    try:
        return outcomes(device)
    except Untested as error:
        warnings.warn(f"The kernels were not tested on {device}: {error}.", RuntimeWarning, stacklevel=2)
        return {}
