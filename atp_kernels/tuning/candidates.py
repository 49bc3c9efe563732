"""The ways to compute one linear in one regime: on the same random operands, held to float64, then timed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from atp_kernels import triton_runtime
from atp_kernels.call import select, shown
from atp_kernels.child import Note, one_line
from atp_kernels.kept.op import kept_linear
from atp_kernels.kept.sides import KeptFirst
from atp_kernels.kept.slices import KeptSlice
from atp_kernels.linear import definition, folded, tiles, ways
from atp_kernels.linear.op import linear_by
from atp_kernels.linear.operands import Operands
from atp_kernels.tuning.clock import Call
from atp_kernels.tuning.table import FIRST, FOLDED, HARD, KEPT, SLICED, ZEROED, Entry, Key, Tile, shown_tile, ways_in
from atp_kernels.tuning.tiled import named_backend

SCALING = 0.5
ALLOWED = 4.0
"""A candidate may be this many times as far from float64 as plain PyTorch in the same dtype."""
MARGIN = 1.03
"""What is not at least this much faster than the way that is taken without a table does not replace it."""


@dataclass(frozen=True)
class Case:
    """Operands of one entry: decision has a soft mask with gradient and frozen factors, `HARD` regimes a hard mask."""

    regime: str
    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    device: torch.device
    keep: float = 0.6

    @property
    def mask_lora(self) -> bool:
        """Whether the mask covers the adapter too."""
        return self.regime == "decision"

    def operands(self) -> Operands:
        """Random operands, always the same; those that are to have a gradient require one."""
        rng = torch.Generator(self.device).manual_seed(0)
        randn = lambda *size: torch.randn(size, generator=rng, device=self.device).to(self.dtype)  # noqa: E731
        trains = self.regime != "decision"
        weight, lora_a = randn(self.n, self.k) / self.k**0.5, randn(self.r, self.k) / self.k**0.5
        mask = torch.rand(self._masked, generator=rng, device=self.device)
        if self.regime in FIRST:
            # What is kept lies first already, so that the order of the slice is that of the definition.
            mask = torch.arange(self._masked, device=self.device) < round(self.keep * self._masked)
        elif self.regime in HARD:
            # The share that is asked for, whatever is drawn.
            mask = mask.argsort() < round(self.keep * self._masked)
        else:
            # Learned decisions round: most of their masks are zero or one.
            mask = torch.where(mask < 0.3, 0.0, torch.where(mask < 0.6, 1.0, mask)).requires_grad_()
        side = "in_mask" if self._of_inputs else "out_mask"
        return Operands(
            randn(self.m, self.k).requires_grad_(),
            weight,
            lora_a.requires_grad_(trains),
            randn(self.n, self.r).requires_grad_(trains),
            **({} if self.regime == "cut" else {side: mask}),
        )

    @property
    def _masked(self) -> int:
        """Positions of the side that has a mask."""
        return self.k if self._of_inputs else self.n

    @property
    def _of_inputs(self) -> bool:
        return self.regime in ("kept_in", "first_in")

    def key(self) -> Key:
        """What the entry is about."""
        kept = round(self.keep * self._masked) / self._masked if self.regime in HARD else 1.0
        return Key(self.regime, shown(self.dtype), self.m, self.n, self.k, self.r, kept)

    def __str__(self) -> str:
        kept = f", {self.key().kept:.2f} kept" if self.regime in HARD else ""
        return f"{self.regime} {self.n}x{self.k} r{self.r} {shown(self.dtype)}, {self.m} rows{kept}"


class Candidate(NamedTuple):
    """A way under its name, and the tile of Triton that it fixes."""

    name: str
    way: ways.Way
    tile: Tile | None = None


def default_of(case: Case) -> str:
    """The name of the way that is taken without a table."""
    if case.regime in KEPT:
        return SLICED
    if case.regime in FIRST:
        return select("kept_lora_linear", case.device, case.dtype).name
    if case.regime == "search" and (found := ways.by_rule(case.device, case.key())) is not None:
        return found.name
    return select("masked_lora_linear", case.device, case.dtype, plain=case.regime == "cut").name


def candidates(case: Case, *, interpreted: bool = False) -> list[Candidate]:
    """Every way that takes the case here, that of today first; Triton in its interpreter only where it is asked for."""
    if case.regime in KEPT:
        return [Candidate(name, ways.Way(name, "a candidate")) for name in ways_in(case.regime)]
    found = list(_backends(case, interpreted))
    if case.regime in FIRST:
        # Without a tile Triton's products are the reference's.
        found = [each for each in found if each.tile or each.name != "triton"]
        return sorted(found, key=lambda each: each.name != default_of(case))
    if case.regime == "search":
        found.append(Candidate(SLICED, ways.Way(SLICED, "a candidate")))
    if folded.refuses(case.operands(), case.mask_lora) is None:
        found.append(Candidate(FOLDED, ways.Way(FOLDED, "a candidate")))
    today = default_of(case)
    if case.regime == "cut":
        # Without masks all backends run the vendor's products, unless a tile keeps Triton from it.
        found = [each for each in found if each.tile or each.name in (today, FOLDED)]
    return sorted(found, key=lambda each: each.name != today)


def _backends(case: Case, interpreted: bool) -> Iterator[Candidate]:
    """Every backend that takes the case, and Triton with each of its tiles."""
    operation = "kept_lora_linear" if case.regime in FIRST else "masked_lora_linear"
    for name in ("native", "triton", "reference"):
        if name == "triton" and triton_runtime.INTERPRETED and not interpreted:
            continue
        try:
            tried = [None, *(_tiles(case) if name == "triton" and case.r <= tiles.LARGEST_RANK else ())]
            for tile in tried:
                module, _ = named_backend(operation, name, tile, case.device, case.dtype)
                shown_name = name if tile is None else f"{name} {shown_tile(tile)}"
                yield Candidate(shown_name, ways.Way(name, "a candidate", module), tile)
        except RuntimeError:
            continue


def _tiles(case: Case) -> Iterator[Tile]:
    """Those of both Triton kernels that are meant for this device; for all devices in the interpreter."""
    from atp_kernels.linear.descriptors import generation  # where Triton is, which these modules do without

    if case.regime not in FIRST:  # where descriptors alone have a kernel
        yield from tiles.gemm_tiles(case.dtype)
    arch = generation(case.device)
    if arch is not None or triton_runtime.INTERPRETED:
        yield from tiles.descriptor_tiles(case.dtype, arch)


Results = dict[str, Tensor]
"""y and the gradients, by name."""


class Reference:
    """The definition of a case in float64, and how far from it a candidate may be."""

    def __init__(self, case: Case) -> None:
        self.case = case
        operands = case.operands()
        self.grad = torch.randn(case.m, case.n, generator=torch.Generator().manual_seed(1)).to(operands.x)
        exact_operands = _mapped(operands, lambda tensor: tensor.double())
        sizes = _mapped(exact_operands, lambda tensor: tensor.abs())
        self.exact = self._by_definition(exact_operands, self.grad.double())
        rough = self._by_definition(operands, self.grad)
        magnitudes = self._by_definition(sizes, self.grad.double().abs())
        eps = torch.finfo(case.dtype).eps
        self.allowed = {
            name: max(ALLOWED * _distance(rough[name], value), 2 * eps * float(magnitudes[name].norm()))
            for name, value in self.exact.items()
        }

    def problem(self, call: Callable[[Operands], Tensor]) -> str | None:
        """Why a candidate is wrong, None where y and every gradient are near enough to float64."""
        operands = self.case.operands()
        found = _results(call(operands), operands, self.grad)
        for name, value in self.exact.items():
            error_of = _distance(found[name], value) if found[name].shape == value.shape else float("nan")
            if not error_of <= self.allowed[name]:
                return f"{name} is {error_of:.1e} from float64, where {self.allowed[name]:.1e} is allowed"
        return None

    def _by_definition(self, operands: Operands, grad: Tensor) -> Results:
        given = operands._asdict()
        y = definition.masked_lora_linear(**given, scaling=SCALING, mask_lora=self.case.mask_lora)
        return _results(y, operands, grad)


class Measured(NamedTuple):
    """The entry of a case, without a way where no candidate is right; the names of those that are wrong.

    today: the name of the way that is taken without a table.
    """

    entry: Entry
    wrong: list[str]
    today: str


def measured(
    case: Case,
    found: Mapping[str, Candidate],
    timed: Callable[[Call], float],
    rounds: int,
    *,
    note: Note = lambda at: None,
    lost: Mapping[str, str] | None = None,
) -> Measured:
    """Hold every candidate to float64, time those that are right in turns, and take the fastest.

    The first of them is the way without a table, which stays where no other is faster by `MARGIN`. note: told the name
    of each candidate before it runs. lost: those that are not to run, and why.
    """
    reference = Reference(case)
    refused: dict[str, str] = {}
    wrong: list[str] = []
    calls: dict[str, Call] = {}
    today = next(iter(found))
    for name, candidate in found.items():
        if lost and name in lost:
            refused[name] = f"it does not run: {lost[name]}"
            continue
        note(name)
        try:
            call = _call_of(case, candidate)
            problem = reference.problem(call)
        except Exception as error:  # Triton has errors of its own for what a GPU has no room for
            refused[name] = f"it does not run: {one_line(error)}"
            if case.device.type == "cuda":
                torch.cuda.synchronize(case.device)  # raises where no other candidate would run in this process
            continue
        if problem is None:
            calls[name] = _step(case, call, reference.grad)
        else:
            refused[name] = problem
            wrong.append(name)
    if not calls:
        return Measured(Entry(case.key(), "", None, {}, refused), wrong, today)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for name, step in calls.items():
        note(name)
        step()  # compiles and fills caches
    for _ in range(rounds):
        for name in order:
            note(name)
            times[name].append(timed(calls[name]))
        order.reverse()  # none always follows the same one
    medians = {name: float(median(values)) for name, values in times.items()}
    best = min(medians, key=lambda name: medians[name])
    if today in medians and medians[today] <= MARGIN * medians[best]:
        best = today
    return Measured(Entry(case.key(), found[best].way.name, found[best].tile, medians, refused), wrong, today)


def _call_of(case: Case, candidate: Candidate) -> Callable[[Operands], Tensor]:
    if case.regime in (*KEPT, *FIRST):
        return _call_on_slice(case, candidate)
    return lambda operands: linear_by(candidate.way, operands, SCALING, case.mask_lora)


def _call_on_slice(case: Case, candidate: Candidate) -> Callable[[Operands], Tensor]:
    """A slice is made once for many calls, so that making it is not timed."""
    given = case.operands()
    out_mask, in_mask = (
        KeptFirst(mask) if mask is not None and case.regime in FIRST else mask
        for mask in (given.out_mask, given.in_mask)
    )
    kept = KeptSlice(given.weight, out_mask=out_mask, in_mask=in_mask)
    kept = kept.zeroed if candidate.name == ZEROED else kept
    return lambda o: kept_linear(o.x, kept, o.lora_a, o.lora_b, None, SCALING, "auto", candidate.way.module)


def _step(case: Case, call: Callable[[Operands], Tensor], grad: Tensor) -> Call:
    """Forward and backward of one step."""
    operands = case.operands()
    wanted = [tensor for tensor in operands if tensor is not None and tensor.requires_grad]
    return lambda: torch.autograd.grad(call(operands), wanted, grad)


def _results(y: Tensor, operands: Operands, grad: Tensor) -> Results:
    leaves = {
        name: tensor for name, tensor in operands._asdict().items() if tensor is not None and tensor.requires_grad
    }
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach()} | {f"the gradient of {name}": each for name, each in zip(leaves, grads, strict=True)}


def _mapped(operands: Operands, change: Callable[[Tensor], Tensor]) -> Operands:
    """The floating operands changed, as leaves that require a gradient where the originals do."""
    changed = {
        name: change(tensor.detach()).requires_grad_(tensor.requires_grad)
        for name, tensor in operands._asdict().items()
        if tensor is not None and tensor.is_floating_point()
    }
    return operands._replace(**changed)


def _distance(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm())
