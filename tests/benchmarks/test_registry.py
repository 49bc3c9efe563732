"""The registry: what options stand for, that variants compute the same, and the work of each by hand."""

import pytest
import torch

from atp_kernels.groups.bench import factor_shapes
from benchmarks.agreement import disagreements
from benchmarks.case import Case, Op, Variant, Work, ready
from benchmarks.gate import ROOT
from benchmarks.limits import Limits
from benchmarks.registry import OPS, cases, find_ops
from benchmarks.shapes import find_model

CHOICE = {"models": ["tiny"], "dtypes": ["float32"], "ranks": [8], "tokens": [32]}


def test_names_are_distinct_and_patterns_choose_among_them_and_unknown_ones_are_told():
    names = [op.name for op in OPS]
    assert len(set(names)) == len(names)
    assert [op.name for op in find_ops(["linear_hard_*", "compact"])] == [
        "compact", "linear_hard_out", "linear_hard_in", "linear_hard_both",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no operation matches 'linera': use one of compact, group_lasso"):
        find_ops(["linear_*", "linera"])
    with pytest.raises(ValueError, match="unknown model '9b': use one of tiny, smollm2-135m"):
        find_model("9b")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_tests_that_an_operation_waits_for_exist(op):
    assert op.tests and not [test for test in op.tests if not (ROOT / test).exists()]


@pytest.mark.parametrize(
    ("model", "linears", "total"),
    [
        # hidden, inner, layers and heads as in the published configs; totals of all decoder linears, computed by hand.
        ("SmolLM2-135M", {"q_proj": (576, 576), "k_proj": (192, 576), "down_proj": (576, 1536)}, 106_168_320),
        ("7b", {"k_proj": (4096, 4096), "gate_proj": (11008, 4096)}, 6_476_005_376),
        ("LLaMA3-8B", {"k_proj": (1024, 4096), "up_proj": (14336, 4096)}, 6_979_321_856),
        ("70b", {"v_proj": (1024, 8192), "o_proj": (8192, 8192), "down_proj": (8192, 28672)}, 68_451_041_280),
    ],
)
def test_model_shapes(model, linears, total):
    sizes = find_model(model)
    assert linears.items() <= sizes.linears.items() and len(sizes.linears) == 7
    assert sizes.linear_params == total


def test_cases_are_one_a_distinct_shape_and_a_number_that_matters():
    (linear,), (lasso,) = find_ops(["linear_unmasked"]), find_ops(["group_lasso"])
    many = {"models": ["llama3-8b"], "dtypes": ["float32", "bfloat16"], "ranks": [8, 16], "tokens": [1, 64]}
    found = cases(linear, **many)
    assert len(found) == 4 * 2 * 2 * 2  # q and o are of one shape, k and v, gate and up
    assert {case.part for case in found} == {"q_proj", "k_proj", "gate_proj", "down_proj"}
    assert len(cases(lasso, **many)) == 2 * 2 * 2 and cases(lasso, **many)[0].tokens == 0
    assert {case.part for case in cases(linear, **many, parts=["k_proj"])} == {"k_proj"}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_variants_compute_the_same(op):
    if op.name.startswith("train_"):
        pytest.importorskip("peft")
    found = cases(op, **CHOICE, length=16, keep=0.6)
    for case in found if op.name == "group_lasso" else found[-1:]:
        wanted = [name for name in op.build(case) if name != "compile"]
        assert disagreements(op, case, wanted) == []


def toy(second):
    x = torch.arange(1.0, 4.0, requires_grad=True)

    def build(case):
        names = ("unfused", "ours", "floor")
        factors = (2.0, second, 7.0)
        return {
            name: Variant(lambda factor=factor: factor * x, (x,), torch.ones(3), same=name != "floor")
            for name, factor in zip(names, factors, strict=True)
        }

    work = {"forward": Work(3, 24), "backward": Work(3, 24)}
    return Op("toy", build, lambda case: work, lambda model: ("model",), ())


def test_a_variant_that_computes_something_else_or_fails_is_found():
    case = Case("toy", "tiny", "model", 1, 1, "float32")
    assert disagreements(toy(2.0), case) == []
    found = disagreements(toy(2.1), case)
    assert [text.split(" by ")[0] for text in found] == [
        "result 0 of ours differs from unfused", "result 1 of ours differs from unfused",
    ]  # fmt: skip

    def fail():
        raise RuntimeError("illegal memory access")

    op = Op("toy", lambda case: {"ours": Variant(fail)}, toy(2.0).work, lambda model: (), ())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ready(op, Case("toy", "tiny", "model", 1, 1, "float32"))


def test_variants_that_cannot_run_are_left_out_with_the_reason():
    case = Case("toy", "tiny", "model", 1, 1, "float32")

    def fail():
        raise RuntimeError("no compiler here.\nmore lines")

    whole = toy(2.0)
    added = {"compile": Variant(fail), "ours:a": "no such backend here.", "ours:b": whole.build(case)["ours"]}
    op = Op("toy", lambda case: whole.build(case) | added, whole.work, whole.parts, ())
    found, skipped = ready(op, case)
    assert list(found) == ["unfused", "ours", "floor"]
    assert skipped == {
        "compile": "no compiler here.", "ours:a": "no such backend here.", "ours:b": "the same as ours",
    }  # fmt: skip
    assert list(ready(op, case, ["ours:b"])[0]) == ["ours:b"]


def work(op, pass_, **changes):
    values = {"model": "tiny", "part": "gate_proj", "tokens": 10, "rank": 4, "dtype": "float32", "keep": 0.5}
    case = Case(op, **values | changes)
    (found,) = find_ops([op])
    return found.work_of(case, pass_)


# gate_proj of the tiny model is 96 x 64 (out x in); M 10, r 4, so r (in + out) = 640.
PRODUCT = 2 * 10 * 96 * 64  # 122,880


@pytest.mark.parametrize(
    ("op", "pass_", "flops", "entries", "more_bytes"),
    [
        # x, W, A and B, y, and S = x A^T that is saved; backward reads dy, W, A, B, x, S, writes dx, dA, dB.
        ("linear_unmasked", "forward", PRODUCT + 2 * 10 * 640, 640 + 6144 + 640 + 960 + 40, 0),
        ("linear_unmasked", "backward", PRODUCT + 4 * 10 * 640, 960 + 6144 + 640 + 640 + 40 + 640 + 640, 0),
        # Half of one side: half of the product and of the weight, all of the rest.
        ("linear_hard_out", "forward", PRODUCT / 2 + 2 * 10 * 640, 640 + 3072 + 640 + 960 + 40, 0),
        ("linear_hard_in", "forward", PRODUCT / 2 + 2 * 10 * 640, 640 + 3072 + 640 + 960 + 40, 0),
        ("linear_hard_both", "backward", PRODUCT / 4 + 4 * 10 * 640, 960 + 1536 + 640 + 640 + 40 + 640 + 640, 0),
        # The sum is saved instead of S and the mask multiplied; backward reads it and writes 96 float32 dL/dm.
        ("linear_decision", "forward", PRODUCT + 2 * 10 * 640 + 960, 640 + 6144 + 640 + 960 + 960, 4 * 96),
        ("linear_decision", "backward", PRODUCT + 2 * 10 * 640 + 3 * 960, 960 + 6144 + 640 + 640 + 960, 8 * 96),
        # Half the rows and half the columns read and written, and 48 + 32 indices of 8 bytes.
        ("compact", "forward", 0, 2 * 48 * 32, 8 * 80),
    ],
)
def test_work_by_hand(op, pass_, flops, entries, more_bytes):
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        found = work(op, pass_, dtype=dtype)
        assert found.flops == flops and found.bytes == item * entries + more_bytes


def test_full_is_forward_and_backward_and_a_training_step_its_products():
    forward, backward, full = (work("linear_unmasked", pass_) for pass_ in ("forward", "backward", "full"))
    assert full == Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    # Linears of the tiny model: 2 x (64 x 64 + 2 x 32 x 64 + 64 x 64 + 3 x 96 x 64) = 61,440; head 64 x 128.
    dense, half = 2 * 10 * (61_440 + 8_192), 2 * 10 * (30_720 + 8_192)
    assert work("train_tune", "full", part="kv_group").flops == 2 * half
    assert work("train_decision", "full", part="kv_group").flops == 2 * dense


def test_work_of_groups_by_hand():
    # A layer of the tiny model, r 4: B of q, k, v, gate, up has 64 + 32 + 32 + 96 + 96 rows, A of o and down 64 + 96
    # columns: 480 groups of 4 entries; two layers.
    assert len(factor_shapes(find_model("tiny"), 4)) == 14
    entries, groups = 2 * 480 * 4, 2 * 480
    assert work("group_lasso", "forward") == Work(2 * entries, 4 * entries + 4 * groups)
    assert work("group_lasso", "backward") == Work(entries / 2, 4 * entries * 1.5 + 4 * groups)
    # kv_group: of a layer 2 groups in each of q, k, v and o, and 3 * 96.
    assert work("group_lasso", "forward", part="kv_group") == Work(2 * entries, 4 * entries + 4 * 2 * 296)
    assert work("group_prox", "forward") == Work(1.5 * entries, 4 * entries)


def test_limits_are_those_of_the_longer_of_computing_and_moving():
    limits = Limits(flops=1e12, bandwidth=1e9)
    assert limits.milliseconds(Work(2e9, 1e3)) == pytest.approx(2.0)
    assert limits.milliseconds(Work(2e3, 5e6)) == pytest.approx(5.0)
    limits = Limits.measured("cpu", torch.float32, gemm=128, copy_bytes=2**20)
    assert 1e8 < limits.flops < 1e14 and 1e7 < limits.bandwidth < 1e13
