"""Tensors that lie in memory as no kernel likes them, with the values of a contiguous one and poison in the gaps."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

_POISON = {torch.bool: True, torch.int64: -(2**40)}


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in its storage: its dimensions reversed or not, then offset, step and repetition of each."""

    reversed: bool = False
    offsets: tuple[int, ...] = (0, 0, 0)
    steps: tuple[int, ...] = (1, 1, 1)
    expanded: tuple[bool, ...] = (False, False, False)

    def values(self, tensor: Tensor) -> Tensor:
        """The values that this layout can hold: a repeated dimension has those of its first entry throughout."""
        for axis in range(tensor.ndim):
            if self.expanded[axis] and tensor.shape[axis]:
                tensor = tensor.narrow(axis, 0, 1).expand_as(tensor)
        return tensor.contiguous()

    def lay(self, tensor: Tensor) -> Tensor:
        """`values` of a tensor, laid out so; what lies between them in the storage is NaN, True or far out of range."""
        values, n = self.values(tensor), tensor.ndim
        repeated = [axis for axis in range(n) if self.expanded[axis] and tensor.shape[axis]]
        sizes = [1 if axis in repeated else size for axis, size in enumerate(values.shape)]
        room = [offset + size * step for offset, size, step in zip(self.offsets, sizes, self.steps, strict=False)]
        order = tuple(reversed(range(n))) if self.reversed else tuple(range(n))
        storage = torch.full([room[axis] for axis in order], _POISON.get(tensor.dtype, torch.nan), dtype=tensor.dtype)
        view = storage.permute(order)
        for axis in range(n):
            first, step = self.offsets[axis], self.steps[axis]
            view = view.narrow(axis, first, room[axis] - first)[(slice(None),) * axis + (slice(None, None, step),)]
        for axis in repeated:
            values = values.narrow(axis, 0, 1)
        return view.copy_(values).expand(tensor.shape)


def layouts(expands: bool = True) -> st.SearchStrategy[Layout]:
    """Layouts of tensors of up to three dimensions; without `expands` no two entries share memory."""
    three = lambda of: st.tuples(of, of, of)  # noqa: E731
    some = three(st.sampled_from([False, False, True]))
    repeated = (some | st.just((True,) * 3)) if expands else st.just((False,) * 3)
    return st.builds(Layout, st.booleans(), three(st.integers(0, 3)), three(st.sampled_from([1, 1, 2, 3])), repeated)
