"""Less memory for activations: `training.gradient_checkpointing` and `training.offload`.

The first is transformers' own. The second keeps what a backward pass reads outside of the model's memory until then,
and what the refit reads of all its windows.

From a GPU that goes to pinned memory of the host, as in `torch.autograd.graph.save_on_cpu`; in a CPU's memory it would
only move from one place to another, so there it goes to a file. Weights stay: they are there anyway.
"""

from __future__ import annotations

import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from atp.ground import heap

SMALLEST = 64 * 2**10  # bytes; what is smaller takes longer to move than its memory is worth

_Back = Callable[[], Tensor]


def recompute_layers(model: Any) -> None:
    """Makes the layers of a PEFT model keep their inputs alone and run again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


class Offload:
    """Where activations go; folder: of the run, for the file that a CPU needs. None: they stay.

    `bytes` is how much the last forward pass has put aside.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.bytes = folder, 0
        self._slots: _Slots | None = None
        # What the last passes put aside, by its address: storages that are still there belong to copies of weights.
        self._saved: dict[int, StorageWeakRef] = {}

    def aside(self, tensor: Tensor) -> _Back:
        """Puts a tensor away; returns what brings it back. Its place is free once that is dropped.

        Raises OSError where the disk is full.
        """
        if self.folder is None or tensor.nbytes < SMALLEST:
            return lambda: tensor
        if tensor.device.type != "cpu":
            return _to_host(tensor)
        self._slots = self._slots or _Slots(_file(self.folder))
        return self._slots.put(tensor)

    @contextmanager
    def saving(self, model: nn.Module) -> Iterator[None]:
        """Around a forward pass: what autograd saves in it is kept elsewhere and comes back in its backward pass.

        The weights of the model stay; what is saved several times is kept once. Raises OSError where the disk is full.
        """
        folder = self.folder
        if folder is None:
            yield
            return
        self._saved = {address: storage for address, storage in self._saved.items() if not storage.expired()}
        stays = heap.addresses(model) | self._saved.keys()
        known: dict[tuple[Any, ...], tuple[StorageWeakRef, _Back]] = {}
        file: BinaryIO | None = None
        self.bytes = 0

        def pack(tensor: Tensor) -> Tensor | _Back:
            nonlocal file
            if tensor.nbytes < SMALLEST or type(tensor) is not Tensor or heap.address(tensor) in stays:
                return tensor
            # The version tells a tensor from what it was before a change in place, the weak reference from a later one
            # that has got the same memory.
            place = heap.address(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
            storage, back = known.get(key := (*place, tensor._version), (None, None))
            if storage is None or back is None or storage.expired():
                storage = StorageWeakRef(tensor.untyped_storage())
                if tensor.device.type == "cpu":
                    file = file or _file(folder)
                    back = _to_file(tensor, file, self.bytes)
                else:
                    back = _to_host(tensor)
                self.bytes += tensor.nbytes
                known[key], self._saved[heap.address(tensor)] = (storage, back), storage
            return back

        with saved_tensors_hooks(pack, lambda kept: kept if isinstance(kept, Tensor) else kept()):
            yield


def _file(folder: Path) -> BinaryIO:
    """A file for one pass, without a name: the system drops it, often unwritten, with the last tensor in it."""
    folder.mkdir(parents=True, exist_ok=True)
    return cast(BinaryIO, tempfile.TemporaryFile(buffering=0, dir=folder))


class _Slots:
    """Tensors in a file, each in the place of an earlier one of its size that nobody needs any more."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.end = file, 0
        self.free: defaultdict[int, list[int]] = defaultdict(list)

    def put(self, tensor: Tensor) -> _Back:
        free = self.free[tensor.nbytes]
        at = free.pop() if free else self.end
        self.end = max(self.end, at + tensor.nbytes)
        back = _to_file(tensor, self.file, at)
        weakref.finalize(back, free.append, at)
        return back


def _to_host(tensor: Tensor) -> _Back:
    """Copies a tensor to the host; returns what brings it back. Both wait their turn on the device alone."""
    device, pinned = tensor.device, tensor.is_cuda
    aside = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    aside.copy_(tensor, non_blocking=pinned)
    return lambda: aside.to(device, non_blocking=pinned)


def _to_file(tensor: Tensor, file: BinaryIO, at: int) -> _Back:
    """Writes a tensor to a file from this byte on; returns what reads it again."""
    shape, dtype = tensor.shape, tensor.dtype
    file.seek(at)
    left = _bytes(tensor.contiguous())
    while left:
        left = left[file.write(left) :]

    def read() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        file.seek(at)
        left = _bytes(tensor)
        while left:
            left = left[file.readinto(left) :]  # type: ignore[attr-defined]
        return tensor

    return read


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
