"""The command line: refusing on a red gate, rows and tables of a run, plots, marks."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cpu_ops, families, gate, overhead, training
from benchmarks.case import Case, Op, Variant, Work
from benchmarks.gate import Mark, conclude
from benchmarks.limits import Limits
from benchmarks.plots import plot
from benchmarks.records import append, read
from benchmarks.run import LimitsOf, measure_case, table

GIVEN = ["--tflops", "1", "--tbps", "0.0001", "--model", "tiny", "--threads", "1", "--rounds", "2"]
COMPACT = ["run", "--op", "compact", "--part", "q_proj", "--dtype", "float32", *GIVEN]


def op_tested_by(path, holds):
    path.write_text(f"def test():\n    assert {holds}\n")
    return Op("toy", lambda case: {}, lambda case: {}, lambda model: (), (str(path),))


def test_a_red_gate_refuses_unless_skipped_and_nothing_is_timed(tmp_path, monkeypatch, capsys):
    green, red = op_tested_by(tmp_path / "test_green.py", True), op_tested_by(tmp_path / "test_red.py", False)
    assert gate.allow([green], skip=False) == "verified"
    with pytest.raises(SystemExit, match="tests fail, so nothing is timed"):
        gate.allow([green, red], skip=False)
    assert gate.allow([red], skip=True) == "unverified"
    monkeypatch.setattr(gate, "verify", lambda ops: False)
    with pytest.raises(SystemExit, match="nothing is timed"):
        command.main([*COMPACT, "--out", str(tmp_path / "rows")])
    assert "p50" not in capsys.readouterr().out and not (tmp_path / "rows").exists()


def test_run_writes_a_row_a_variant_that_says_unverified_and_plot_a_png_an_operation(tmp_path, capsys):
    command.main([*COMPACT, "--no-verify", "--out", str(tmp_path)])
    rows = read(tmp_path / "compact.csv")
    assert {row["variant"] for row in rows} >= {"unfused", "ours", "floor"}
    assert {row["gate"] for row in rows} == {"unverified"} and "(unverified)" in capsys.readouterr().out
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        # 38 of 64 rows and columns, read and written, and their indices, at 100 MB/s.
        assert float(row["limit_ms"]) == pytest.approx((2 * 38 * 38 * 4 + 8 * 76) / 1e5, abs=6e-5)
    base = next(row for row in rows if row["variant"] == "unfused")
    assert base["speedup"] == "1.0"
    pytest.importorskip("matplotlib")
    compact = next(op for op in command.OPS if op.name == "compact")
    written = plot(command.OPS, tmp_path)
    assert written == [tmp_path / "compact.png"]
    assert written[0].read_bytes().startswith(b"\x89PNG\r\n") and written[0].stat().st_size > 5000
    older = written[0].read_bytes()
    append(tmp_path / "compact.csv", [read(tmp_path / "compact.csv")[0] | {"speedup": "3.5"}])
    plot([compact], tmp_path)
    assert written[0].read_bytes() != older  # the newest row of a variant counts


def test_check_ends_with_success_and_overhead_prints_a_line_a_pass(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        command.main(["check", "--op", "compact", *GIVEN[4:8]])
    assert ended.value.code == 0 and "all variants agree" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no operation matches 'nonsense'"):
        command.main(["verify", "--op", "nonsense"])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr("sys.argv", ["overhead", "--rounds", "20"])
    overhead.main()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["forward", "forward and backward"]


def test_plot_without_matplotlib_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        plot(command.OPS, tmp_path)


def test_speed_up_is_over_the_base_in_the_same_round(monkeypatch):
    x = torch.ones(4)
    op = Op("toy", lambda case: {"unfused": Variant(x.clone), "ours": Variant(x.clone)},
            lambda case: {"forward": Work(2e6, 1e3)}, lambda model: ("m",), (), ("forward",))  # fmt: skip
    ticks = {"unfused": [8.0, 3.0, 4.0], "ours": [4.0, 1.0, 2.0]}
    monkeypatch.setattr("benchmarks.run.interleave", lambda *arguments: ticks)
    case = Case("toy", "tiny", "m", 1, 1, "float32")
    rows, skipped = measure_case(op, case, passes=["forward"], rounds=3, limits=Limits(1e9, 1e9))
    shown = [(row["p50_ms"], row["speedup"], row["share_of_limit"]) for row in rows]
    assert shown == [(4.0, 1.0, 0.5), (2.0, 2.0, 1.0)]
    assert "2.00x" in table(case, rows, skipped) and "100.0% of the limit" in table(case, rows, skipped)
    ticks["ours"] = [2.0, 3.0, 1.0]  # the same middle, and other ratios
    rows, _ = measure_case(op, case, passes=["forward"], rounds=3, limits=Limits(1e9, 1e9), base="ours")
    assert [(row["base"], row["p50_ms"], row["speedup"]) for row in rows] == [("ours", 4.0, 0.25), ("ours", 2.0, 1.0)]


def test_given_limits_are_taken_and_others_measured(monkeypatch):
    measured = SimpleNamespace(calls=0)

    def limits(device, dtype):
        measured.calls += 1
        return Limits(5.0, 6.0)

    monkeypatch.setattr(Limits, "measured", limits)
    case = Case("toy", "tiny", "m", 1, 1, "float32")
    assert LimitsOf(2, 3)(case) == Limits(2e12, 3e12) and measured.calls == 0
    partly = LimitsOf(2, None)
    assert partly(case) == partly(case) == Limits(2e12, 6.0) and measured.calls == 1


def test_marks():
    above, below = Mark("speed", 1.5, 1.5), Mark("memory", 1.01, 1.0, at_most=True)
    assert above.holds and not below.holds
    assert str(below) == "FAIL  memory: 1.010 <= 1"
    assert conclude([above]) == 0 and conclude([above, below]) == 1 and conclude([]) == 1


def row(variant, speedup, peak=1.0, **more):
    values = {"op": "linear_hard_out", "part": "q_proj", "rank": 8, "dtype": "float32", "variant": variant}
    return values | {"speedup": speedup, "peak_mib": peak} | more


def values(marks):
    return [(round(mark.value, 3), mark.bound, mark.holds) for mark in marks]


def test_marks_of_the_cpu_operations():
    def marks(op, dtype, ours, peak=1.0):
        same = {"op": op, "dtype": dtype}
        rows = [row("unfused", 1.0, **same), row("ours", ours, peak, **same)]
        return values(cpu_ops.linear_marks(rows, addmm_mib=1.0))

    assert marks("linear_hard_out", "float32", 1.5) == [(1.5, 1.5, True), (1.0, 1.001, True)]
    assert marks("linear_hard_in", "bfloat16", 1.2, 1.2) == [(1.2, 1.25, False), (1.2, 1.001, False)]
    assert marks("linear_hard_both", "float32", 2.0) == [(2.0, 2.3, False), (1.0, 1.001, True)]
    assert marks("linear_hard_both", "bfloat16", 1.5) == [(1.0, 1.001, True)]
    assert marks("linear_unmasked", "bfloat16", 0.976) == [(0.976, 0.98, False), (1.0, 1.001, True)]
    rows = [row("unfused", 1.0), row("ours", 1.5), row("ours_kept_first", 2.0, 2.0)]
    assert values(cpu_ops.linear_marks(rows, 1.0)) == [(1.5, 1.5, True), (1.0, 1.001, True), (2.0, 1.001, False)]
    rows = [row("unfused", 1.0), row("ours", 10.0), row("ours_direct", 20.0)]
    (mark,) = cpu_ops.lasso_marks([found | {"part": "kv_group"} for found in rows])
    assert values([mark]) == [(20.0, 20.0, True)] and "kv_group" in mark.what and "autograd 10.0x" in mark.what


def test_marks_of_training_take_the_better_dtype_of_each_side():
    def step(op, variant, keep, float32, bfloat16):
        same = {"op": op, "variant": variant, "keep": keep, "model": "smollm2-135m", "part": "kv_group", "tokens": 1024,
                "rank": 8}  # fmt: skip
        return [same | {"dtype": "float32", "p50_ms": float32}, same | {"dtype": "bfloat16", "p50_ms": bfloat16}]

    rows = [
        *step("train_decision", "ours", 0.6, 23.0, 50.0), *step("train_decision", "floor", 0.6, 30.0, 20.0),
        *step("train_search", "ours", 0.6, 16.0, 20.0), *step("train_search", "unfused", 0.6, 50.0, 20.0),
        *step("train_search", "stock", 0.6, 15.0, 40.0), *step("train_tune", "stock", 0.6, 30.0, 28.0),
        *step("train_tune", "ours", 0.6, 21.0, 20.0), *step("train_tune", "stock", 0.4, 30.0, 28.0),
        *step("train_tune", "ours", 0.4, 14.0, 20.0),
        *step("train_open", "stock", 0.6, 30.0, 28.0), *step("train_open", "ours", 0.6, 28.0, 14.0),
    ]  # fmt: skip
    # Parameters of linears and head: 106,168,320 and 28,311,552, so 1.4615 times fewer at 60 %, 1.9 at 40 %.
    assert values(training.marks(rows)) == [
        (round(28 / 20 / 1.4615, 3), 0.9, True), (round(28 / 14 / 1.9, 3), 0.9, True),
        (2.0, 1.0, True), (1.25, 1.25, True), (0.938, 1.0, False), (1.15, 1.15, True),
    ]  # fmt: skip


@pytest.mark.parametrize(("speed", "status"), [(0.9, 0), (0.89, 1)])
def test_steps_of_families_beside_llamas(speed, status, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "ratio", lambda llamas, ours: speed)
    given = "gemma3_text olmo2 phi3 --model tiny --batch 2 --length 8 --rank 2 --threads 1 --rounds 2 --dtype float32"
    assert families.main([*given.split(), "--out", str(tmp_path)]) == status
    rows = read(tmp_path / "families.csv")
    assert [(row["family"], row["step"]) for row in rows] == [
        (family, step) for family in ("gemma3_text", "olmo2", "phi3") for step in ("open", "tune", "refit")
    ]
    assert {row["family"]: row["space"] for row in rows} == {
        "gemma3_text": "kv_group",
        "olmo2": "mlp",
        "phi3": "kv_group",
    }
    assert all(float(row["ms"]) > 0 and float(row["llama_ms"]) > 0 for row in rows)
