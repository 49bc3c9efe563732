"""What a benchmark is made of: an operation, one case of it, and the variants that are timed side by side."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shapes import Model, find_model

PASSES = ("forward", "backward", "full")


@dataclass(frozen=True)
class Case:
    """One measurement's circumstances.

    part: a linear of the model, or the name of a larger piece of it. tokens: rows of x. keep: share of a masked side
    that stays. length (tokens of a window) and checkpointing (of activations) are asked by whole training steps alone.
    """

    op: str
    model: str
    part: str
    tokens: int
    rank: int
    dtype: str
    device: str = "cpu"
    keep: float = 0.6
    length: int = 256
    checkpointing: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def sizes(self) -> Model:
        return find_model(self.model)

    @property
    def linear(self) -> tuple[int, int]:
        """(out, in) of the linear that `part` names."""
        return self.sizes.linears[self.part]

    def __str__(self) -> str:
        numbers = {"tokens": self.tokens, "r": self.rank}
        shown = [f"{name} {value}" for name, value in numbers.items() if value]
        return " ".join([self.op, self.model, self.part, *shown, self.dtype, f"keep {self.keep:g}"])


@dataclass(frozen=True)
class Variant:
    """One way to do the work. inputs: what gradients are asked for, none where the call does all there is.

    grad: dL/dy. adds: the full pass adds to the inputs' `.grad`, as training does; else it returns the gradients.
    whole: the call itself is such a full pass, and there is no other. same: whether it computes the operation's own
    function; a floor or a mark without masks does not.
    holds: objects that own the tensors which live between calls: operands, models, optimizers.
    """

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...] = ()
    grad: Tensor | tuple[Tensor, ...] | None = None
    adds: bool = False
    whole: bool = False
    same: bool = True
    holds: tuple[object, ...] = ()

    def prepare(self, pass_: str) -> Callable[[], object]:
        """The call to time; what a backward pass needs is computed before."""
        if pass_ == "forward" or self.whole or not self.inputs:
            return self.forward
        if pass_ == "backward":
            y = self.forward()
            return lambda: torch.autograd.grad(y, self.inputs, self.grad)
        if self.adds:
            return lambda: torch.autograd.backward(self.forward(), self.grad)
        return lambda: torch.autograd.grad(self.forward(), self.inputs, self.grad)

    def able(self, pass_: str) -> bool:
        """Whether there is such a pass of this variant."""
        return pass_ == "full" or not self.whole and (pass_ == "forward" or bool(self.inputs))


Variants = dict[str, Variant | str]


@dataclass(frozen=True)
class Work:
    """The least that a pass has to do: floating point operations, and bytes with every operand moved once."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Op:
    """A benchmarked operation. Registering one is such an entry in `benchmarks.registry`.

    build: the variants of a case by name, on random data, or why there is none of that name here. work: forward and, if
    there is one, backward. parts: those of a model. tests: what must be green before a speed-up is printed, relative to
    the repository. ignores: numbers of a case that change nothing. base: the variant that speed-ups are counted from.
    """

    name: str
    build: Callable[[Case], Variants]
    work: Callable[[Case], dict[str, Work]]
    parts: Callable[[Model], tuple[str, ...]]
    tests: tuple[str, ...]
    passes: tuple[str, ...] = PASSES
    ignores: tuple[str, ...] = ()
    base: str = "unfused"

    def work_of(self, case: Case, pass_: str) -> Work:
        """The least work of one pass; `full` is forward and backward."""
        parts = self.work(case)
        return parts["forward"] + parts["backward"] if pass_ == "full" else parts[pass_]


def ready(op: Op, case: Case, wanted: list[str] | None = None) -> tuple[dict[str, Variant], dict[str, str]]:
    """The variants that work here, each called once, and for the others the reason why they do not.

    The first call is never timed: it compiles, gathers and fills caches. A backend that is the only one to take the
    call is `ours` itself and is not listed twice. Where the compiler fails that is a reason too; any other failure is
    raised.
    """
    found, skipped = {}, {}
    for name, variant in op.build(case).items():
        if wanted and name not in wanted:
            continue
        if isinstance(variant, str):
            skipped[name] = variant
            continue
        try:
            variant.prepare("full")()
            found[name] = variant
        except RuntimeError as error:
            if name != "compile":
                raise
            skipped[name] = str(error).strip().splitlines()[0]
    backends = [name for name in found if name.startswith("ours:")]
    if len(backends) == 1 and "ours" in found:
        skipped[backends[0]] = "the same as ours"
        del found[backends[0]]
    return found, skipped
