"""A run on a GPU tests its kernels first: once, in the main process, and all processes go by what it found."""

import pytest
import torch

from atp import integrations, run
from atp.ground import ranks
from atp.processes import kernels, processes
from atp.training import loop
from atp_kernels import call
from atp_kernels.selftest import Outcome, Untested

GPU = torch.device("cuda", 0)
FOUND = {"rms_norm": Outcome("triton", "it crashed", None, 0.0), "compact": Outcome("native", None, 0.1, 0.1)}


@pytest.fixture
def asked(monkeypatch):
    """The devices that were tested, as if this process had a GPU."""
    tested = []
    monkeypatch.setattr(processes, "device", lambda: GPU)
    monkeypatch.setattr(kernels, "outcomes", lambda device: tested.append(device) or FOUND)
    monkeypatch.setattr(kernels, "_tested", set())
    call.override.cache_clear()
    yield tested
    call.override.cache_clear()
    call.set_aside("cuda", {})


def test_the_kernels_of_a_gpu_are_tested_once_and_what_failed_is_set_aside(asked):
    with pytest.warns(RuntimeWarning, match="rms_norm failed the self-test on cuda:0 and is computed by reference"):
        kernels.check_once()
    kernels.check_once()
    assert asked == [GPU]
    assert call.why_aside("rms_norm", "cuda") == "triton failed the self-test: it crashed"
    assert call.why_aside("compact", "cuda") is None and call.why_aside("rms_norm", "cpu") is None


@pytest.mark.filterwarnings("error")
def test_nothing_is_tested_on_a_cpu_where_a_backend_is_named_or_in_other_processes(asked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(processes, "device", lambda: torch.device("cpu"))
        kernels.check_once()
    with monkeypatch.context() as patch:
        patch.setenv(call.ENVIRONMENT, "reference")
        call.override.cache_clear()
        kernels.check_once()
    call.override.cache_clear()
    assert call.why_aside("rms_norm", "cuda") is None
    monkeypatch.setattr(kernels, "_tested", set())
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(processes, "on_main", lambda work: FOUND)
    kernels.check_once()
    assert asked == [] and call.why_aside("rms_norm", "cuda") == "triton failed the self-test: it crashed"


def test_a_gpu_that_no_other_process_can_use_costs_a_warning(asked, monkeypatch):
    def busy(device):
        raise Untested("the device is busy")

    monkeypatch.setattr(kernels, "outcomes", busy)
    with pytest.warns(RuntimeWarning, match="The kernels were not tested on cuda:0: the device is busy"):
        kernels.check_once()


class Reached(Exception):
    """The kernels are tested before anything else happens."""


def test_a_run_a_loop_and_a_callback_begin_with_it(config, monkeypatch):
    def stop():
        raise Reached

    monkeypatch.setattr(kernels, "check_once", stop)
    for name in ("_check_arguments", "_check_optimizer", "_unwrapped"):
        monkeypatch.setattr(integrations, name, lambda *a: None)
    callback = integrations.ATPCallback([{"input_ids": [1, 2, 3]}], search=1)
    for begin in (
        run.Run(config)._prepare,
        lambda: loop.Loop(config, None, None, None, None),
        lambda: callback.on_train_begin(None, None, None, model=None, optimizer=None),
    ):
        with pytest.raises(Reached):
            begin()
