"""A device of its own on a machine that has none: tensors on it hold values, and every wait for it is noticed.

torch lets Python stand for a device (`privateuseone`). Its tensors keep their values in a CPU tensor that nobody else
sees, so code cannot tell them from a GPU's: their device differs from the host's, and what brings values across must
pass here. Waits are noted with the line that asked for them:

* reads: values, or sizes that depend on values, that come to the host;
* uploads: copies to the device without `non_blocking=True`, and host tensors used as an index of device tensors.

What CUDA refuses raises here too: mixing both devices in other ways, `numpy()`, and here also `tolist()`.
"""

import traceback
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "standin"
# What torch dispatches, at any depth, to bring a value or a size that depends on values to the host.
READS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::allclose", "aten::unique_dim", "aten::_unique2", "aten::unique_consecutive", "aten::repeat_interleave",
    "aten::bincount", "aten::argwhere",
}  # fmt: skip
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPIES = {"aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize"}


class _Module(_DummyBackendModule):
    """What `torch.standin` must answer for autocast, and for whoever forks the random state of all devices."""

    def is_available(self):
        return False  # to others in this process, which would take it for the device to train on

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.empty(0, dtype=torch.uint8)  # it draws nothing of its own

    def set_rng_state(self, state, device=None):
        pass


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)
_FALLBACK, _ATEN = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
# Of the operators that autocast changes on a GPU, these get a narrow dtype; the kernels cast for themselves.
_FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _narrowed(function):
    def call(*args, **kwargs):
        dtype = torch.get_autocast_dtype(NAME)
        with torch.autocast(NAME, enabled=False):
            cast = (arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)
            return function(*cast, **kwargs)

    return call


for _function in (torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention):
    _ATEN.impl(_function.__name__, _narrowed(_function), "AutocastPrivateUse1")


class Held(torch.Tensor):
    """A tensor on the device; `raw` is where its values are."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        held = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        held.raw = raw
        return held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, lambda kind, name: None)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        self.raw = other.raw
        torch.Tensor.data.__set__(self, other)

    def data_ptr(self):
        return self.raw.data_ptr()

    def __deepcopy__(self, memo):
        copy = Held(self.raw.clone()).requires_grad_(self.requires_grad)
        memo[id(self)] = copy = torch.nn.Parameter(copy, self.requires_grad) if hasattr(self, "_is_param") else copy
        return copy

    def __repr__(self):
        return f"Held({list(self.shape)}, {self.dtype})"


class StandIn(TorchDispatchMode):
    """Makes the device usable inside a with block. `waits` lists (kind, operator, line of atp or of the test)."""

    def __init__(self):
        super().__init__()
        self.waits, self.operators, self.uploads, self._watching = [], 0, 0, False

    def __enter__(self):
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is then a copy that passes here
        # The engine's thread of the device would know no stream of it.
        self._threads = torch.autograd.set_multithreading_enabled(False)
        self._threads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self._threads.__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        return super().__exit__(*error)

    @contextmanager
    def watching(self):
        """Notes waits, and counts operators and uploads that nobody waits for, inside a with block."""
        before, self._watching = self._watching, True
        try:
            yield self
        finally:
            self._watching = before

    @contextmanager
    def allowed(self):
        """Notes nothing inside a with block: what is meant to wait."""
        before, self._watching = self._watching, False
        try:
            yield
        finally:
            self._watching = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += self._watching
        return _run(func, args, kwargs or {}, self._note)

    def _note(self, kind, name):
        if not self._watching:
            return
        if kind == "upload without a wait":
            self.uploads += 1
            return
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        ours = [f for f in frames if "/atp" in f.filename] or frames
        self.waits.append((kind, name, f"{ours[-1].filename}:{ours[-1].lineno}"))


def _run(func, args, kwargs, note):
    """Runs an operator on the values, and notes what a device would have to be waited for."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    held = [tensor for tensor in tensors if isinstance(tensor, Held)]
    places = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    to_device = any(place.type == NAME for place in places)
    if not held and not to_device:
        return func(*args, **kwargs)
    name, to_host = func._schema.name, bool(places) and not to_device
    _look(name, args, kwargs, tensors, held, to_host, note)

    def raw(leaf):
        if isinstance(leaf, Held):
            return leaf.raw
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf

    if torch.Tag.inplace_view in func.tags:  # changes shape and strides, of which both tensors have their own
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
    args, kwargs = tree_unflatten([raw(leaf) for leaf in leaves], spec)
    result = func(*args, **kwargs)
    if to_host:
        return result
    given = {id(tensor.raw): tensor for tensor in held} | {id(t): t for t in tensors if not isinstance(t, Held)}

    def wrapped(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return given[id(leaf)] if id(leaf) in given else Held(leaf)

    return tree_map(wrapped, result)


def _look(name, args, kwargs, tensors, held, to_host, note):
    host = [tensor for tensor in tensors if not isinstance(tensor, Held)]
    if name in _COPIES or name == "aten::_to_copy":
        if name in _COPIES:  # (to, from, non_blocking), where only one of them may be the device's
            crosses, reads = len(held) < len(tensors), not isinstance(args[0], Held)
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            crosses, reads = bool(host) or to_host, to_host
            waits = not kwargs.get("non_blocking", False)
        if crosses:
            # The host cannot know when a copy to it is complete, so it waits whatever it asks for.
            note("read" if reads else "upload" if waits else "upload without a wait", name)
        return
    if name in READS:
        note("read", name)
    if name in _INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            note("read", f"{name} by a mask")
        if any(not isinstance(index, Held) for index in indices):
            note("upload", f"{name} by a tensor of the host")
        host = [tensor for tensor in host if not any(tensor is index for index in indices)]
    if any(tensor.dim() for tensor in host):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {NAME} and cpu")
