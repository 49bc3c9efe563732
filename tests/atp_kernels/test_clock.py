"""The clock of a GPU, on a stand-in for one: a queue of launches that host and device work at in their own time."""

import time
from types import SimpleNamespace

import pytest

from atp_kernels.tuning import clock

FILL, LAUNCH, KERNEL = 0.033, 0.004, 0.005  # milliseconds


class Gpu:
    """Launches take the host LAUNCH each; the device begins a kernel once it is launched and the last is done."""

    def __init__(self):
        self.host = self.device = 0.0
        self.fills = 0

    def launch(self, milliseconds, of_host=LAUNCH):
        self.host += of_host
        self.device = max(self.device, self.host) + milliseconds

    def wait(self, device=None):
        self.host = self.device = max(self.device, self.host)

    def zero_(self):
        self.fills += 1
        self.launch(FILL)

    def event(gpu, enable_timing):
        class Event:
            def record(self):
                self.at = max(gpu.device, gpu.host)

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    properties = SimpleNamespace(L2_cache_size=2**20)
    cuda = SimpleNamespace(get_device_properties=lambda _: properties, Event=made.event, synchronize=made.wait)
    monkeypatch.setattr(clock, "torch", SimpleNamespace(cuda=cuda, empty=lambda *a, **options: made, int8=None))
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: made.host / 1e3))
    return made


def call_of(gpu, launches, of_host=LAUNCH, kernel=KERNEL):
    return lambda: [gpu.launch(kernel, of_host) for _ in range(launches)]


def test_a_call_that_the_host_launches_slowly_takes_the_time_of_its_kernels(gpu):
    timed = clock.clock("cuda:0")
    for launches in (40, 3, 40):
        assert timed(call_of(gpu, launches, of_host=0.02)) == pytest.approx(launches * KERNEL)


def test_the_start_grows_with_what_the_host_needs(gpu):
    """The host needs 6 ms for what takes the device 1.5 ms."""
    timed, call = clock.clock("cuda:0"), call_of(gpu, 300, of_host=0.02)
    assert timed(call) > 2 * 300 * KERNEL
    assert timed(call) == timed(call) == pytest.approx(300 * KERNEL)


def test_a_call_is_run_once_and_the_queue_stays_short(gpu):
    """A backward pass frees what it reads, so that it cannot be run again."""
    timed, runs = clock.clock("cuda:0"), []

    def waits():
        runs.append(gpu.fills)
        gpu.launch(1.0)
        gpu.wait()
        gpu.launch(1.0)

    assert [timed(waits) for _ in range(20)] == pytest.approx([2.0 + LAUNCH] * 20)
    assert len(runs) == 20 and runs[-1] - runs[-2] == clock.MOST_FILLS


def test_a_cpu_is_timed_by_the_wall_clock():
    assert 20 <= clock.clock("cpu")(lambda: time.sleep(0.02)) < 2000
