"""Which programs of a kernel touch the same memory: Triton's interpreter, told to note addresses.

The interpreter runs the programs of a launch one after the other, so what two of them do to one place looks right. On a
GPU they run in any order.
"""

from collections import Counter
from contextlib import contextmanager

import numpy as np
from triton.runtime import interpreter


class Launches:
    """kernels: how often each was launched. races: (kernel, what two programs do) for each launch that has a race."""

    def __init__(self):
        self.kernels, self.races = Counter(), []
        self._stores, self._loads = [], []

    def begin(self):
        self._stores, self._loads = [], []

    def end(self, kernel):
        self.kernels[kernel] += 1
        writers, stored = _touched(self._stores)
        again = stored[1:] == stored[:-1]
        if np.any(again & (writers[1:] != writers[:-1])):
            self.races.append((kernel, "both store"))
        readers, loaded = _touched(self._loads)
        if len(stored):
            at = np.minimum(np.searchsorted(stored, loaded), len(stored) - 1)
            if np.any((stored[at] == loaded) & (writers[at] != readers)):
                self.races.append((kernel, "one loads what another stores"))

    def note(self, builder, pointers, mask, kind):
        x, y, z = builder.grid_idx
        program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        chosen = np.unique(addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)])
        (self._stores if kind == "store" else self._loads).append((program, chosen))


def _touched(notes):
    """(program, address) of all that was touched, once each, in the order of addresses."""
    if not notes:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    programs = np.concatenate([np.full(len(addresses), program, np.int64) for program, addresses in notes])
    addresses = np.concatenate([addresses for _, addresses in notes])
    order = np.lexsort((programs, addresses))
    programs, addresses = programs[order], addresses[order]
    new = np.ones(len(order), bool)
    new[1:] = (programs[1:] != programs[:-1]) | (addresses[1:] != addresses[:-1])
    return programs[new], addresses[new]


@contextmanager
def watched(monkeypatch):
    """Notes all launches in a with block; atomic operations are no races."""
    found, builder = Launches(), interpreter.InterpreterBuilder
    launch, store, load = interpreter.GridExecutor.__call__, builder.create_masked_store, builder.create_masked_load

    def launched(self, *args, **kwargs):
        found.begin()
        result = launch(self, *args, **kwargs)
        found.end(self.fn.__name__)
        return result

    def stored(self, pointers, value, mask, *rest, **named):
        found.note(self, pointers, mask, "store")
        return store(self, pointers, value, mask, *rest, **named)

    def loaded(self, pointers, mask, *rest, **named):
        found.note(self, pointers, mask, "load")
        return load(self, pointers, mask, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(builder, "create_masked_store", stored)
        patch.setattr(builder, "create_masked_load", loaded)
        yield found
