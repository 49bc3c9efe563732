"""Time and memory of calls: interleaved rounds on a CPU or a GPU, and the peak of what was allocated."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from types import FunctionType, ModuleType

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from atp_kernels.tuning.clock import clock
from benchmarks.case import Variant


def interleave(variants: dict[str, Variant], pass_: str, rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every variant, round by round; each must have run before.

    Every other round goes through the variants backwards, so that none always follows the same one.
    """
    timed = clock(device)
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for _ in range(rounds):
        for name in names:
            times[name].append(timed(variants[name].prepare(pass_)))
        names.reverse()
    return times


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of the list lies below, nearest rank."""
    return sorted(values)[round(share * (len(values) - 1))]


def ratio(above: list[float], below: list[float]) -> float:
    """Median over rounds of one variant's time over another's in the same round.

    What slows a whole round, as other work on the machine does, cancels; in a ratio of two medians it does not.
    """
    return median(one / other for one, other in zip(above, below, strict=True))


def peak_bytes(variant: Variant, pass_: str, device: str) -> int:
    """The most that one pass holds at a time beyond what lived before it.

    On a GPU the caching allocator's own count. On a CPU every allocation and release of torch's allocator, in order,
    as its profiler records them: exact, unlike the resident size, which holds freed pages too. Scratch memory that a
    vendor GEMM takes outside torch is not in it.
    """
    call = variant.prepare(pass_)
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = call()
        del result
        return max((size for _, size in allocated_bytes(recorded)), default=0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def allocated_bytes(recorded: profile) -> Iterator[tuple[int, int]]:
    """(time in ns, bytes held then) after each allocation and release of the CPU allocator that a profile recorded.

    Only blocks that were allocated within the profile count. The profiler also reports the release of blocks that an
    earlier profile saw: whatever the garbage collector frees late would lower the sum.
    """
    waiting = list(recorded.profiler.kineto_results.experimental_event_tree())
    blocks: list[tuple[int, int, int]] = []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            blocks.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    sizes: dict[int, int] = {}
    held = 0
    for time, address, size in sorted(blocks, key=lambda block: block[0]):
        if size > 0:
            sizes[address] = size
            held += size
        else:
            held -= sizes.pop(address, 0)
        yield time, held


def resident_peak_bytes() -> int:
    """The most resident memory that this process has had since `reset_resident_peak`, or since its start. Linux."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def reset_resident_peak() -> None:
    """Lets the peak start from what is resident now. Linux; raises OSError where the kernel does not allow it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def held_bytes(roots: tuple[object, ...]) -> int:
    """Bytes of all tensors that can be reached from these objects through containers and attributes, each once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[object] = list(roots)
    while stack:
        owner = stack.pop()
        if id(owner) in seen or isinstance(owner, type | ModuleType | FunctionType):
            continue
        seen.add(id(owner))
        if isinstance(owner, Tensor):
            storage = owner.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            stack.append(owner.grad if owner.is_leaf else None)
        elif isinstance(owner, Mapping):
            stack.extend(owner.values())
        elif isinstance(owner, list | tuple | set):
            stack.extend(owner)
        else:
            stack.extend(getattr(owner, "__dict__", {}).values())
    return sum(sizes.values())
