"""Tensors that lie in memory as no kernel likes them, with the values of a contiguous one and poison in the gaps."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

_POISON = {torch.bool: True, torch.int64: -(2**40)}


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in its storage: its dimensions reversed or not, then offset, step and repetition of each.

    `sliding` takes the place of all that: each row is the one before it, moved on by one element of the storage.
    """

    reversed: bool = False
    offsets: tuple[int, ...] = (0, 0, 0)
    steps: tuple[int, ...] = (1, 1, 1)
    expanded: tuple[bool, ...] = (False, False, False)
    sliding: bool = False

    def values(self, tensor: Tensor) -> Tensor:
        """The values that this layout can hold: a repeated dimension has those of its first entry throughout."""
        if self.sliding:
            return _window(tensor).as_strided(tensor.shape, (1,) * tensor.ndim).contiguous()
        for axis in range(tensor.ndim):
            if self.expanded[axis] and tensor.shape[axis]:
                tensor = tensor.narrow(axis, 0, 1).expand_as(tensor)
        return tensor.contiguous()

    def lay(self, tensor: Tensor) -> Tensor:
        """`values` of a tensor, laid out so; what lies between them in the storage is NaN, True or far out of range."""
        view = self._slid(tensor) if self.sliding else self._laid(tensor)
        # No step along an axis of one entry is ever taken.
        steps = [2**40 if size == 1 else step for size, step in zip(view.shape, view.stride(), strict=True)]
        return view.as_strided(view.shape, steps)

    def _slid(self, tensor: Tensor) -> Tensor:
        values = _window(tensor)
        storage = torch.full(
            (self.offsets[0] + len(values) + 1,), _poison(tensor), dtype=tensor.dtype, device=tensor.device
        )
        memory = storage[self.offsets[0] :][: len(values)].copy_(values)
        return memory.as_strided(tensor.shape, (1,) * tensor.ndim)

    def _laid(self, tensor: Tensor) -> Tensor:
        values, n = self.values(tensor), tensor.ndim
        repeated = [axis for axis in range(n) if self.expanded[axis] and tensor.shape[axis]]
        sizes = [1 if axis in repeated else size for axis, size in enumerate(values.shape)]
        room = [offset + size * step for offset, size, step in zip(self.offsets, sizes, self.steps, strict=False)]
        order = tuple(reversed(range(n))) if self.reversed else tuple(range(n))
        storage = torch.full([room[axis] for axis in order], _poison(tensor), dtype=tensor.dtype, device=tensor.device)
        view = storage.permute(order)
        for axis in range(n):
            first, step = self.offsets[axis], self.steps[axis]
            view = view.narrow(axis, first, room[axis] - first)[(slice(None),) * axis + (slice(None, None, step),)]
        for axis in repeated:
            values = values.narrow(axis, 0, 1)
        return view.copy_(values).expand(tensor.shape)


def _window(tensor: Tensor) -> Tensor:
    """The entries of a tensor on a path from its first to its last one, along its last dimension first."""
    at = [0] * tensor.ndim
    path = [tensor[tuple(at)]]
    for axis in reversed(range(tensor.ndim)):
        for _ in range(tensor.shape[axis] - 1):
            at[axis] += 1
            path.append(tensor[tuple(at)])
    return torch.stack(path).detach()


def _poison(tensor: Tensor) -> bool | float:
    return _POISON.get(tensor.dtype, torch.nan)


def layouts(expands: bool = True) -> st.SearchStrategy[Layout]:
    """Layouts of tensors of up to three dimensions; without `expands` no two entries share memory."""
    three = lambda of: st.tuples(of, of, of)  # noqa: E731
    some = three(st.sampled_from([False, False, True]))
    repeated = (some | st.just((True,) * 3)) if expands else st.just((False,) * 3)
    steps, sliding = three(st.sampled_from([1, 1, 2, 3])), st.sampled_from([False] * 4 + [expands])
    return st.builds(Layout, st.booleans(), three(st.integers(0, 3)), steps, repeated, sliding)
