"""A non-finite gradient changes nothing, is counted and ends the run after K in a row; a signal ends it in order."""

import copy
import os
import signal
import threading

import pytest
import torch

from atp.ground.errors import Interrupted
from atp.ground.signals import SignalGuard
from atp.processes.finite import FiniteGuard


def step(model, optimizer, guard, number, poison=None):
    model(torch.linspace(-1, 1, 6).view(2, 3)).square().sum().backward()
    if poison is not None:
        model.weight.grad[0, 1] = poison
    guard.check(optimizer, number)
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), FiniteGuard(limit=2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_step_leaves_weights_moments_and_step_count_alone(parts, poison):
    model, optimizer, guard = parts
    step(model, optimizer, guard, 1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    step(model, optimizer, guard, 2, poison)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert guard.skipped == 1
    step(model, optimizer, guard, 3)
    assert guard.skipped == 1 and not torch.equal(model.weight, before[0]["weight"])


def test_good_steps_between_start_the_count_anew(parts):
    model, optimizer, guard = parts
    for number, poison in enumerate([float("nan"), None, float("nan"), None]):
        step(model, optimizer, guard, number, poison)
    guard.report()
    assert guard.skipped == 2


@pytest.fixture
def seen():
    """Signals that reach the handler from before all guards."""
    received = []
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    yield received
    signal.signal(signal.SIGTERM, previous)


def send(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)


def test_the_first_signal_is_noted_and_the_second_acts_as_usual(seen):
    with SignalGuard() as guard:
        send()
        assert guard.received == signal.SIGTERM and not seen
        send()
        assert seen == [signal.SIGTERM]


def test_a_second_signal_acts_as_usual_inside_all_guards(seen):
    with SignalGuard(at_once=True), SignalGuard() as inner:
        send()
        assert inner.received == signal.SIGTERM and not seen
        send()
        assert seen == [signal.SIGTERM]
    send()
    assert len(seen) == 2


def test_the_innermost_guard_acts_and_hands_back(seen):
    with pytest.raises(Interrupted):
        with SignalGuard(at_once=True):
            with SignalGuard() as inner:
                pass
            send()
            pytest.fail("went on")
    assert inner.received is None and not seen


def test_an_interruption_is_nobodys_failure(seen):
    """Libraries catch Exception and go on with something else."""
    with pytest.raises(Interrupted) as caught:
        with SignalGuard(at_once=True):
            try:
                send()
            except Exception:
                pytest.fail("swallowed")
    assert caught.value.signum == signal.SIGTERM


def test_an_ignored_hangup_stays_ignored():
    """So does nohup tell a program to outlive its terminal."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalGuard(at_once=True) as guard:
            send(signal.SIGHUP)
        assert guard.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_other_threads_may_train_too():
    def work():
        with SignalGuard(at_once=True) as guard:
            done.append(guard.received)

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [None]
