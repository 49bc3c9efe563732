"""What every backend must do alike: the same error in the same words, and the same values of odd operands."""

import itertools
import math

import pytest
import torch
from backends_here import DEVICE, backends

import atp_kernels
from atp_kernels import GroupPlan, KeptSlice, Projection

NAN, INF = math.nan, math.inf
META = torch.device("meta")


def factors():
    return [torch.arange(1.0, 13.0).view(4, 3).requires_grad_()]


INDEX = torch.tensor([0, 1, 1, 2])
ROWS = [(0, INDEX)]
REMOVED = torch.tensor([True, False, True])


def linear(backend, **changed):
    x, weight, lora_a, lora_b = (torch.ones(size) for size in ((5, 4), (3, 4), (2, 4), (3, 2)))
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "out_mask": torch.ones(3)} | changed
    return atp_kernels.masked_lora_linear(**tensors, scaling=1.0, backend=backend)


def lasso(backend, made=factors, removed=REMOVED, **options):
    return atp_kernels.group_lasso(made(), ROWS, removed, backend=backend, **options)


def lasso_grad(backend, made=factors, **options):
    return atp_kernels.group_lasso_grad_(made(), ROWS, REMOVED, backend=backend, **options)


def prox(backend, threshold=0.5, made=factors):
    return atp_kernels.group_prox_([factor.detach() for factor in made()], ROWS, REMOVED, threshold, backend=backend)


def expanded():
    return [torch.ones(1, 3).expand(4, 3)]


def compact(backend, rows=None, cols=None, weight=None):
    index = [torch.tensor(side, dtype=torch.int64) if isinstance(side, list) else side for side in (rows, cols)]
    return atp_kernels.compact(torch.ones(4, 3) if weight is None else weight, *index, backend=backend)


def entropy(backend, targets=(0, 1), logits=None):
    targets = targets if isinstance(targets, torch.Tensor) else torch.tensor(targets)
    return atp_kernels.cross_entropy_(torch.ones(2, 3) if logits is None else logits, targets, backend=backend)


def norm(backend, **options):
    return atp_kernels.rms_norm(torch.ones(2, 3), torch.ones(3), backend=backend, **{"eps": 1e-6} | options)


def add_norm(backend, **options):
    x = torch.ones(2, 3)
    return atp_kernels.add_rms_norm(x, x, torch.ones(3), backend=backend, **{"eps": 1e-6} | options)


def kept(backend, x=None, **changed):
    slice_ = KeptSlice(torch.ones(3, 4), out_mask=torch.tensor([True, False, True]))
    operands = {"lora_a": torch.ones(2, 4), "lora_b": torch.ones(3, 2)} | changed
    x = torch.ones(5, 4) if x is None else x
    return atp_kernels.kept_lora_linear(x, slice_, **operands, scaling=1.0, backend=backend)


EPS = "eps is {}: give a finite number of at least 0."
REFUSED = [
    *(
        (op, call, {"eps": eps}, EPS.format(eps))
        for (op, call), eps in itertools.product(
            (
                ("group_lasso", lasso), ("group_lasso_grad_", lasso_grad), ("rms_norm", norm),
                ("add_rms_norm", add_norm),
            ),
            (NAN, -1e-8, INF),
        )
    ),
    *(
        ("group_prox_", prox, {"threshold": bad}, f"threshold is {float(bad)}: give a number of at least 0.")
        for bad in (NAN, -0.5)
    ),
    (
        "group_prox_", prox, {"threshold": torch.ones(3, dtype=torch.int64)},
        "threshold is torch.int64 on cpu: give a number, or a floating tensor on cpu.",
    ),
    (
        "group_prox_", prox, {"threshold": torch.ones(3, device=META)},
        "threshold is torch.float32 on meta: give a number, or a floating tensor on cpu.",
    ),
    *(
        ("compact", compact, {side: index}, f"{side} holds {first} to {last}: every index must lie in [0, {size}).")
        for side, index, first, last, size in (
            ("rows", [2, -1, 0], -1, 2, 4), ("rows", [4], 4, 4, 4), ("cols", [-3], -3, -3, 3), ("cols", [0, 3], 0, 3, 3)
        )
    ),
    ("compact", compact, {"rows": torch.tensor([1], dtype=torch.int32)}, "rows must be a 1-D int64 tensor on cpu"),
    (
        "compact", compact, {"rows": torch.tensor(1)},
        "rows must be a 1-D int64 tensor on cpu, or a bool mask there, or None for all.",
    ),
    ("compact", compact, {"cols": torch.tensor([1], device=META)}, "cols must be a 1-D int64 tensor on cpu"),
    *(
        ("cross_entropy_", entropy, {"targets": bad}, f"targets hold {min(bad)} to {max(bad)}: every target must lie")
        for bad in ((0, -1), (3, 1), (-100, 2))
    ),
    ("cross_entropy_", entropy, {"targets": torch.tensor([0, 1]).to(META)}, "targets are torch.int64 of shape [2]"),
    ("cross_entropy_", entropy, {"targets": torch.tensor([0, 1]).int()}, "targets are torch.int32 of shape [2]"),
    *(
        ("masked_lora_linear", linear, {name: torch.ones(size, device=META)}, f"{name} is on meta and x on cpu")
        for name, size in (("out_mask", 3), ("in_mask", 4), ("bias", 3), ("weight", (3, 4)), ("lora_input", (5, 4)))
    ),
    ("masked_lora_linear", linear, {"out_mask": torch.tensor(1.0)}, "out_mask has shape [], but weight and x need"),
    ("masked_lora_linear", linear, {"out_mask": torch.ones(3).int()}, "out_mask is torch.int32: give a bool"),
    ("masked_lora_linear", linear, {"x": torch.tensor(1.0)}, "x has shape [], but weight [3, 4] needs [..., 4]."),
    ("kept_lora_linear", kept, {"x": torch.ones(5, 4, device=META)}, "x is on meta and the slice on cpu"),
    ("kept_lora_linear", kept, {"lora_b": torch.ones(3, 2, device=META)}, "lora_b is on meta and the slice on cpu"),
    ("group_lasso", lasso, {"removed": REMOVED.to(META)}, "removed is on meta and the factors on cpu"),
    ("group_lasso_grad_", lasso_grad, {"weight": torch.ones((), device=META)}, "weight is torch.float32 of shape []"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "call", "options", "message"), REFUSED, ids=[f"{case[0]}-{i}" for i, case in enumerate(REFUSED)]
)
def test_every_backend_refuses_with_the_same_sentence(op, call, options, message):
    said = set()
    for backend in ("auto", *backends(op, device="cpu")):
        with pytest.raises(ValueError) as raised:
            call(backend, **options)
        said.add(str(raised.value))
    assert len(said) == 1 and next(iter(said)).startswith(message)


PLAN = GroupPlan.of(factors(), ROWS, 3)


@pytest.mark.parametrize(
    ("plan", "given", "message"),
    [
        (PLAN, [], "the plan was made for 1 factors of other shapes"),
        (PLAN, [torch.ones(4, 3).long()], "a factor is torch.int64"),
        (
            GroupPlan(PLAN.axes, PLAN.shapes, PLAN.index + 2**30, PLAN.order, PLAN.starts),
            [factors()[0].detach()],
            "put together by hand: make it with GroupPlan.of",
        ),
    ],
)
def test_a_plan_that_does_not_fit_or_that_nobody_checked_is_refused(plan, given, message):
    for backend in backends("group_lasso", device="cpu"):
        for call in (atp_kernels.group_lasso, atp_kernels.group_lasso_grad_):
            with pytest.raises(ValueError, match=message):
                call(given, plan, REMOVED, backend=backend)
        with pytest.raises(ValueError, match=message):
            atp_kernels.group_prox_(given, plan, REMOVED, 0.5, backend=backend)


def three_projections(**changed):
    """Projections of 4, 6 and 6 outputs whose weights lie in one storage; `changed` has what they get instead."""
    weights = torch.ones(16, 4).split((4, 6, 6))
    made = [Projection(w, torch.ones(2, 4), torch.ones(len(w), 2), 1.0, torch.ones(len(w))) for w in weights]
    return [linear._replace(**{name: change[i] for name, change in changed.items()}) for i, linear in enumerate(made)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_b": (torch.ones(6, 2), torch.ones(4, 2), torch.ones(6, 2))}, "lora_b has shape [6, 2]"),
        ({"bias": (torch.ones(6), torch.ones(4), torch.ones(6))}, "bias has shape [6]"),
        (
            {
                "lora_a": (torch.ones(1, 4), torch.ones(3, 4), torch.ones(2, 4)),
                "lora_b": (torch.ones(4, 3), torch.ones(6, 1), torch.ones(6, 2)),
            },
            "lora_b has shape [4, 3]",
        ),
        ({"lora_a": (torch.ones(2, 4), torch.ones(2, 4, device=META), torch.ones(2, 4))}, "lora_a is on meta and x on"),
        ({"bias": (torch.ones(4), torch.ones(6, device=META), None)}, "bias is on meta and x on cpu"),
        ({"masks": (torch.ones(6), torch.ones(4), None)}, "out_mask has shape [6], but weight and x need [4]."),
        ({"masks": (None, torch.ones(6, device=META), torch.ones(6))}, "out_mask is on meta and x on cpu"),
        ({"masks": (torch.tensor(True), None, None)}, "out_mask has shape [], but weight and x need [4]."),
    ],
)
def test_projections_that_only_fit_together_are_refused(changed, message):
    masks, parts = changed.get("masks", (None,) * 3), {k: v for k, v in changed.items() if k != "masks"}
    for backend in backends("masked_lora_qkv", device="cpu"):
        with pytest.raises(ValueError) as raised:
            atp_kernels.masked_lora_qkv(torch.ones(5, 4), *three_projections(**parts), masks=masks, backend=backend)
        assert str(raised.value).startswith(message)


def test_a_call_that_is_refused_has_written_nothing():
    whole = torch.ones(4, 3)
    for backend in backends("group_prox_", device="cpu"):
        with pytest.raises(ValueError, match=r"factors\[1\] has several elements"):
            atp_kernels.group_prox_([whole, *expanded()], ROWS * 2, REMOVED, 0.5, backend=backend)
        assert (whole == 1).all()


@pytest.mark.parametrize("op", ["group_prox_", "group_lasso_grad_"])
def test_every_backend_refuses_a_factor_that_is_given_twice(op):
    said = set()
    for backend in backends(op, device="cpu"):
        options = {"threshold": 0.5} if op == "group_prox_" else {}
        with pytest.raises(RuntimeError) as raised, torch.set_grad_enabled(op != "group_prox_"):
            getattr(atp_kernels, op)(factors() * 2, ROWS * 2, REMOVED, **options, backend=backend)
        said.add(str(raised.value))
    assert said == {"a tensor appears twice among the factors of an in-place call; give each of them once."}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 1], ids=["kept", "removed"])
def test_group_operations_see_a_bad_value_in_its_group_alone(at, bad, separate):
    """Kept groups count nothing, whatever they hold; a removed one makes the value, and NaN its gradient, visible."""
    removed = torch.tensor([False, True, True, False], device=DEVICE)
    groups = [(0, torch.tensor([0, 1, 2, 3] if separate else [0, 1, 2, 2], device=DEVICE))]
    results = []
    for backend in backends("group_lasso"):
        factor = factors()[0].detach().to(DEVICE).requires_grad_()
        with torch.no_grad():
            factor[at, 1] = bad
        plan = GroupPlan.of([factor], groups, 4)
        value = atp_kernels.group_lasso([factor], plan, removed, backend=backend)
        (grad,) = torch.autograd.grad(value, factor)
        direct = atp_kernels.group_lasso_grad_([factor], plan, removed, weight=1.0, backend=backend)
        shrunk = factor.detach().clone()
        atp_kernels.group_prox_([shrunk], plan, removed, 0.5, backend=backend)
        results.append((value.detach(), direct, grad, factor.grad, shrunk))
        assert value.isfinite() == (at == 0)
        assert grad[[0, 2, 3]].isfinite().all() and (grad[0] == 0).all()
        assert grad[1].isnan().all() == (at == 1 and math.isnan(bad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], equal_nan=True)


def test_what_a_plan_hands_out_are_copies():
    """A kernel reads and writes where a plan says: no edit of what a caller can reach may lead it elsewhere."""
    for backend in backends("group_prox_", device="cpu"):
        (factor,) = factors()
        plan = GroupPlan.of([factor], ROWS, 3)
        for handed_out in (plan.index, plan.order, plan.starts, plan.groups[0][1]):
            handed_out.numpy()[:] = 2**30
        value = atp_kernels.group_lasso([factor], plan, REMOVED, backend=backend)
        assert torch.equal(value, lasso(backend))
        shrunk, expected = factor.detach().clone(), factor.detach().clone()
        atp_kernels.group_prox_([shrunk], plan, REMOVED, 0.5, backend=backend)
        atp_kernels.group_prox_([expected], ROWS, REMOVED, 0.5, backend=backend)
        assert torch.equal(shrunk, expected)
        for name in ("axes", "shapes", "index", "order", "starts", "runs"):
            with pytest.raises(AttributeError):
                setattr(plan, name, getattr(plan, name))


def test_an_operator_takes_the_parts_of_a_plan_in_any_memory():
    for backend in backends("group_prox_", device="cpu"):
        factor, expected = (factors()[0].detach() for _ in range(2))
        parts = [torch.stack([p.long(), p.long() + 2**30], 1)[:, 0] for p in (PLAN.index, PLAN.order, PLAN.starts)]
        torch.ops.atp_kernels.group_prox_([factor], PLAN.axes, *parts, REMOVED, torch.ones(3), backend)
        atp_kernels.group_prox_([expected], PLAN, REMOVED, 1.0, backend=backend)
        assert torch.equal(factor, expected)


@pytest.mark.parametrize("field", ["index", "order", "starts"])
@pytest.mark.parametrize("bad", [-1, 1, 2**30])
def test_an_operator_takes_no_plan_that_leads_out_of_its_factors(field, bad):
    """torch.ops is open to everybody too, and is handed the parts of a plan."""
    (factor,) = (made.detach() for made in factors())
    parts = {name: getattr(PLAN, name) for name in ("index", "order", "starts")}
    arguments = (REMOVED, torch.ones(3), "auto")
    torch.ops.atp_kernels.group_prox_([factor], PLAN.axes, *parts.values(), *arguments)
    parts[field][-1] = bad
    for wrong in (parts.values(), [part[:0] for part in parts.values()], [PLAN.index, PLAN.order, PLAN.starts + 1]):
        with pytest.raises(ValueError, match="are those of no plan for these factors"):
            torch.ops.atp_kernels.group_prox_([factor], PLAN.axes, *wrong, *arguments)
