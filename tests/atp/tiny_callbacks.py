"""Callbacks that tests hang into a run."""

import os
import signal

from atp.training.callbacks import Callback


class AtStep(Callback):
    """Calls `before` and `after` around LoRA steps, numbered from 1."""

    def before(self, loop, step):
        pass

    def after(self, loop, step):
        pass

    def on_phase(self, loop):
        self.before(loop, loop.step + 1)

    def on_step(self, loop, record):
        self.after(loop, loop.step)
        if loop.phases.of(loop.step) == loop.phases.of(loop.step - 1) and loop.step < loop.phases.total:
            self.before(loop, loop.step + 1)


class StopAt(AtStep):
    def __init__(self, step, signum=signal.SIGINT):
        self.step, self.signum = step, signum

    def before(self, loop, step):
        if step == self.step:
            os.kill(os.getpid(), self.signum)


class Poison(AtStep):
    def __init__(self, first, last):
        self.first, self.last, self.handles = first, last, []

    def before(self, loop, step):
        if self.first <= step <= self.last:
            parameter = next(p for p in loop.model.parameters() if p.requires_grad)
            self.handles.append(parameter.register_hook(lambda grad: grad * float("nan")))

    def after(self, loop, step):
        while self.handles:
            self.handles.pop().remove()
