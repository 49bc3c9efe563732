"""The processes of one run: which one writes, what they agree on, and waits that a signal can interrupt.

torchrun and accelerate start a run in several processes. The main one (rank 0) decides, writes, scores and prints; the
others train and wait for it. What they tell each other here travels through a gloo group of its own: it needs no
device sync, and it may wait for as long as the main process scores.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from atp.ground import ranks
from atp.ground.errors import PROCESS_ENDED, InputError, NotReached
from atp.processes import attempts, heartbeat

T = TypeVar("T")

_PATIENCE = timedelta(days=30)  # the default of 30 minutes would end a run in which the main process scores for longer
_POLL_SECONDS = (1e-4, 0.05)  # at first and at last
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (ZeRO)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "FSDP_OFFLOAD_PARAMS": "FSDP with offloading",
}
NO_SHARDS = (
    "is not supported: start the run with `torchrun --nproc_per_node N` or `accelerate launch --multi_gpu`, and shard "
    "its weights with training.sharding=fsdp"
)
SAME_FILES = "put the same files on all machines"
_FSDP = "ACCELERATE_USE_FSDP"
_control: dist.ProcessGroup | None = None
_launched_sharded = _sharded = False


def count() -> int:
    """How many processes this run has."""
    return dist.get_world_size() if _started() else ranks.count()


def rank() -> int:
    """The number of this process, 0 for the main one."""
    return dist.get_rank() if _started() else ranks.rank()


def is_main() -> bool:
    """Whether this process is the one that writes, scores and prints."""
    return rank() == 0


def start(sharding: str | None = None, settings: Mapping[str, Any] | None = None) -> None:
    """Joins the other processes, if any. sharding: `training.sharding`; accelerate's FSDP 2 asks for `fsdp` too.

    settings: what else all of them must have been started with. Raises `InputError` in all where one was started with
    another value, and if the launcher asks for another way to spread a model over processes.
    """
    global _launched_sharded, _sharded
    for variable, name in _REFUSED.items():
        if _asks(variable):
            raise InputError(f"{name} {NO_SHARDS}")
    if _asks(_FSDP):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise InputError(f"FSDP 1 {NO_SHARDS}, or add --fsdp_version 2")
        _launched_sharded = True
        os.environ[_FSDP] = "false"  # accelerate would shard the adapter too, and the model once more
    _sharded = (sharding == "fsdp" or _launched_sharded) and count() > 1
    _join()
    asked = _flat(settings or {}) | {"training.sharding": _sharded}
    refuse_differences(asked, "was started with", "give all processes the same command and config")


def sharded() -> bool:
    """Whether each process holds a share of the frozen weights."""
    return _sharded


def together(work: Callable[[], T]) -> T:
    """The main process's result of work that runs the model: where its weights are in shards, all must run it."""
    if not sharded():
        return on_main(work)
    result = work()
    return on_main(lambda: result)


def device() -> torch.device:
    """Where this process trains: an accelerator of its own, or the CPU where there is none."""
    return _state().device


def wait() -> None:
    """Returns once every process has called it. Signals are handled meanwhile.

    Raises `NotReached` when another process ended instead.
    """
    if count() > 1:
        _finish(dist.barrier(group=_group(), async_op=True))


def on_main(work: Callable[[], T]) -> T:
    """Runs `work` in the main process and returns its result in all. The result must be picklable.

    `InputError` and `NotReached` of the main process are raised in all; after any other exception the rest end with
    `NotReached`.
    """
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]  # result and error
    if is_main():
        try:
            outcome[0] = work()
        except (InputError, NotReached) as refused:
            outcome[1] = refused
    wait()
    dist.broadcast_object_list(outcome, src=0, group=_group())
    result, error = outcome
    if error is not None:
        if not is_main():
            error.told_by_main = True
        raise error
    return result


def refuse_differences(values: Mapping[str, Any], verb: str, remedy: str) -> None:
    """Raises `InputError` in all processes if two of them hold different values under one name.

    verb: what a process does with the values, for the sentence. They must be picklable.
    """
    if count() == 1:
        return
    wait()
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, (platform.node(), dict(values)), group=_group())
    first: dict[str, int] = {}  # name -> the first process that has it
    for number, (host, theirs) in enumerate(found):
        other = [name for name, value in theirs.items() if found[first.setdefault(name, number)][1][name] != value]
        if other:
            with_it = first[other[0]]
            told: Any = InputError(
                f"process {number} on {host} {verb} other {', '.join(other)} than process {with_it} on "
                f"{found[with_it][0]}: {remedy}"
            )
            told.told_by_main = not is_main()
            raise told


def main_first(work: Callable[[], T]) -> T:
    """Runs `work` in the main process and then in the others: by then its downloads are there.

    `InputError` and `NotReached` of the main process are raised in all, and the others do not start.
    """
    kept: list[T] = []
    on_main(lambda: kept.append(work()))
    return kept[0] if kept else work()


def told_by_main(error: BaseException) -> bool:
    """Whether an error came here from the main process, which tells the user of it."""
    return getattr(error, "told_by_main", False)


def largest(value: int) -> int:
    """The largest of the processes' values; this is how a signal to one process reaches all."""
    if count() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64)
    _finish(dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_group(), async_op=True))
    return int(tensor)


def mean(value: float) -> float:
    """The mean of the processes' values."""
    if count() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    _finish(dist.all_reduce(tensor, group=_group(), async_op=True))
    return float(tensor) / count()


def shares(total: int) -> tuple[list[int], int]:
    """Which of `total` pieces of work this process does, as many as every other one, and how many do not count.

    Piece k goes to process k modulo their number. Where the pieces do not go round, the last one of a process is the
    last of all once more: processes that exchange weights in a piece of work must all do one.
    """
    numbers = range(rank(), -(-total // count()) * count(), count())
    return [min(number, total - 1) for number in numbers], sum(number >= total for number in numbers)


def sum_(tensor: Tensor) -> Tensor:
    """Replaces a tensor by its sum over the processes, in place, and returns it."""
    if count() > 1 and (work := begin_sum(tensor)) is not None:
        work.wait()
    return tensor


def begin_sum(tensor: Tensor) -> dist.Work | None:
    """Begins to replace a tensor by its sum over the processes; it holds the sum after `wait` of what is returned."""
    # Without a device in between, through the group that also works beside NCCL.
    return dist.all_reduce(tensor, group=_group() if tensor.is_cpu else None, async_op=True)


def average_(tensor: Tensor | None) -> None:
    """Replaces a tensor by its mean over the processes, in place; None stays None in all."""
    if tensor is not None and count() > 1:
        sum_(tensor).div_(count())


def broadcast_(tensor: Tensor) -> None:
    """Replaces a tensor by the main process's, in place. The same dtype and shape everywhere."""
    if count() > 1:
        sent = tensor.contiguous()
        dist.broadcast(sent, src=0, group=_group() if tensor.is_cpu else None)
        if sent is not tensor:
            tensor.copy_(sent)


def any_of(value: T | None) -> T | None:
    """The value of the first process that has one; None if none has. It must be picklable."""
    if count() == 1:
        return value
    found: list[T | None] = [None] * count()
    dist.all_gather_object(found, value, group=_group())
    return next((one for one in found if one is not None), None)


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, in their order. The same dtype and shape everywhere."""
    if count() == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(count())]
    dist.all_gather(found, tensor.contiguous(), group=_group() if tensor.is_cpu else None)
    return found


def from_main(tensor: Tensor, name: str) -> Tensor:
    """The main process's tensor in every process, on the device of its own. Any dtype, the same shape everywhere.

    name says what it is in the `NotReached` that is raised should the processes not hold the same afterwards.
    """
    if count() == 1:
        return tensor
    # Bool travels as bytes, which every backend sends.
    dtype = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
    sent = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    _finish(dist.broadcast(sent, src=0, group=_group(), async_op=True))
    digest = hashlib.sha256(sent.flatten().view(torch.uint8).numpy().data).digest()
    mine = torch.tensor(int.from_bytes(digest[:8], "little", signed=True))
    found = [torch.empty_like(mine) for _ in range(count())]
    _finish(dist.all_gather(found, mine, group=_group(), async_op=True))
    if any(int(other) != int(mine) for other in found):
        raise NotReached(f"the processes do not hold the same {name}: look for a faulty device or link, then --resume")
    return sent.to(tensor.device, tensor.dtype)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested settings by their whole names, as "training.lr"."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _asks(variable: str) -> bool:
    """Whether the launcher has set a variable to yes, or a number of processes to more than one."""
    value = os.environ.get(variable, "").lower()
    return value not in ("", "0", "1", "false") if variable.endswith("_SIZE") else value in ("1", "true")


def _state() -> PartialState:
    meeting = {} if _started() else attempts.meeting()
    # Processes on CPUs are alone together without `cpu`.
    return PartialState(cpu=not torch.accelerator.is_available(), **meeting)


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def _join() -> None:
    global _control
    if count() > 1 and _control is None:
        _state()
        _control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name, src=0, group=_control)
        heartbeat.begin(name[0], rank(), count(), wait)


def _group() -> dist.ProcessGroup:
    _join()
    assert _control is not None, "there is one process"
    return _control


def _finish(work: dist.Work | None) -> None:
    """Polls, because Python handles signals between its own instructions only."""
    assert work is not None, "it was asked to run beside us"
    delay, longest = _POLL_SECONDS
    try:
        while not work.is_completed():
            time.sleep(delay)
            delay = min(2 * delay, longest)
        work.wait()
    except RuntimeError:
        raise NotReached(PROCESS_ENDED) from None
