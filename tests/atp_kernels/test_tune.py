"""`python -m atp_kernels.tune`: only right candidates are timed, the fastest is written, a new process takes it."""

import json
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from atp_kernels import extension, triton_runtime, tune
from atp_kernels.child import Child, Lost
from atp_kernels.linear import ways
from atp_kernels.linear.tiles import descriptor_tiles, gemm_tiles
from atp_kernels.tuning import candidates as tuned
from atp_kernels.tuning import shapes, table
from atp_kernels.tuning.apart import SERVED, measured_apart
from atp_kernels.tuning.candidates import Case, Measured, Reference, candidates, measured
from atp_kernels.tuning.table import Entry
from atp_kernels.tuning.tiled import Tiled

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TODAY = "native" if extension.AVAILABLE else "reference"
SIZES = {"m": 20, "n": 24, "k": 28, "r": 3, "dtype": torch.float32, "device": CPU}


def named(case, **options):
    return {candidate.name: candidate for candidate in candidates(case, **options)}


def call_of(case, candidate):
    return tuned._call_of(case, candidate)


@pytest.mark.parametrize(("regime", "expected"), [
    ("decision", {TODAY, "reference", "folded"}),
    ("search", {TODAY, "reference", "sliced", "folded"}),
    ("cut", {TODAY, "folded"}),
    ("kept_out", {"sliced", "zeroed"}),
    ("kept_in", {"sliced", "zeroed"}),
    ("first_out", {TODAY, "reference"}),
    ("first_in", {TODAY, "reference"}),
])  # fmt: skip
def test_candidates_of_a_cpu(regime, expected):
    found = named(Case(regime, **SIZES))
    assert found.keys() == expected and next(iter(found)) == ("sliced" if regime in table.KEPT else TODAY)


def test_slices_are_first_where_they_are_taken_without_a_table(monkeypatch):
    monkeypatch.setattr(ways, "LEAST_SAVED", 0)
    assert next(iter(named(Case("search", **SIZES | {"m": 300})))) == "sliced"
    assert next(iter(named(Case("search", **SIZES | {"m": 300}, keep=0.9)))) == TODAY


def test_float16_is_not_folded_where_a_mask_has_a_gradient():
    assert "folded" not in named(Case("decision", **SIZES | {"dtype": torch.float16}))
    assert "folded" in named(Case("search", **SIZES | {"dtype": torch.float16}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", table.REGIMES)
def test_every_candidate_is_right(regime, dtype):
    case = Case(regime, **SIZES | {"n": 104, "k": 88, "dtype": dtype})  # wide enough for slices to be narrower
    reference = Reference(case)
    assert {name: reference.problem(call_of(case, each)) for name, each in named(case).items()} == dict.fromkeys(
        named(case)
    )


@pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="is about the kernels in Triton's interpreter")
@pytest.mark.parametrize("regime", [regime for regime in table.REGIMES if regime not in table.KEPT])
def test_tiles_of_triton_are_candidates_and_right(regime):
    case = Case(regime, **SIZES)
    found = named(case, interpreted=True)
    tiles = {name: each for name, each in found.items() if each.tile}
    with_descriptors = {f"triton {name}": name for name in descriptor_tiles(case.dtype)}
    others = 0 if regime in table.FIRST else len(gemm_tiles(case.dtype))
    assert len(tiles) == others + len(with_descriptors) and with_descriptors
    assert not tiles.keys() & named(case).keys()
    assert {name: each.tile for name, each in tiles.items() if name in with_descriptors} == with_descriptors
    assert all(Reference(case).problem(call_of(case, tiles[name])) is None for name in with_descriptors)
    name, candidate = next(iter(tiles.items()))
    assert name == f"triton {table.shown_tile(candidate.tile)}" and candidate.way.name == "triton"
    calls = []
    tile = Tiled(lambda *a: calls.append("forward") or candidate.way.module.forward(*a),
                      lambda *a: calls.append("backward") or candidate.way.module.backward(*a))  # fmt: skip
    assert Reference(case).problem(call_of(case, candidate._replace(way=candidate.way._replace(module=tile)))) is None
    assert calls == ["forward", "backward"]


def broken(call, name):
    """The call with a result, or with one gradient, that is not the definition's."""

    def changed(operands):
        if name == "y":
            return call(operands) * 1.01
        return call(operands._replace(**{name: _Tripled.apply(getattr(operands, name))}))

    return changed


class _Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


@pytest.mark.parametrize(("regime", "name"), [
    *(("decision", name) for name in ("y", "x", "out_mask")),
    *(("cut", name) for name in ("y", "x", "lora_a", "lora_b")),
])  # fmt: skip
def test_an_error_in_the_result_or_in_any_gradient_is_found(regime, name):
    case = Case(regime, **SIZES)
    right = call_of(case, named(case)["reference" if regime == "decision" else TODAY])
    assert Reference(case).problem(right) is None
    problem = Reference(case).problem(broken(right, name))
    assert problem.startswith(f"{'y' if name == 'y' else f'the gradient of {name}'} is "), problem


def times(**milliseconds):
    """A clock for candidates that are called in the order of these names, and then backwards, and so on."""
    order = list(milliseconds)
    values = cycle([milliseconds[name] for name in (*order, *reversed(order))])
    return lambda call: next(values)


@pytest.mark.parametrize(("spent", "winner"), [
    ({"folded": 1.0}, "folded"), ({"folded": 3.0}, TODAY), ({"folded": 1.95}, TODAY), ({"folded": 1.93}, "folded"),
])  # fmt: skip
def test_the_fastest_is_taken_if_it_beats_today_s_by_the_margin(spent, winner):
    case = Case("cut", **SIZES)
    entry, wrong, _ = measured(case, named(case), times(**{TODAY: 2.0} | spent), rounds=3)
    assert (entry.way, entry.tile, wrong, entry.refused) == (winner, None, [], {})
    assert entry.milliseconds == {TODAY: 2.0} | spent and entry.key == case.key()


def test_times_are_medians_over_rounds():
    case = Case("cut", **SIZES)
    values = iter([9.0, 1.0, 2.0, 4.0, 3.0, 50.0])  # today's, folded; folded, today's; today's, folded
    entry, _, _ = measured(case, named(case), lambda call: next(values), rounds=3)
    assert entry.milliseconds == {TODAY: 4.0, "folded": 2.0}


@pytest.fixture
def wrong_fold(monkeypatch):
    """The folded product with a scaling that is a little off."""
    right = tuned.linear_by

    def changed(way, operands, scaling, mask_lora):
        return right(way, operands, scaling * (1.01 if way.name == "folded" else 1.0), mask_lora)

    monkeypatch.setattr(tuned, "linear_by", changed)


def test_a_wrong_candidate_is_reported_and_neither_timed_nor_taken(wrong_fold):
    case = Case("cut", **SIZES)
    entry, wrong, _ = measured(case, named(case), times(**{TODAY: 2.0}), rounds=3)
    assert (entry.way, wrong, list(entry.milliseconds)) == (TODAY, ["folded"], [TODAY])
    assert "from float64" in entry.refused["folded"]
    # Even where it is all there is.
    entry, wrong, _ = measured(case, {"folded": named(case)["folded"]}, times(folded=1.0), rounds=3)
    assert (entry.way, entry.milliseconds, wrong) == ("", {}, ["folded"])


def test_a_candidate_that_does_not_run_is_left_out(monkeypatch):
    class OutOfResources(Exception):
        pass

    def fails(way, *rest):
        raise OutOfResources("out of resource: shared memory\nmore")

    case = Case("cut", **SIZES)
    found = named(case)
    right = tuned.linear_by
    monkeypatch.setattr(tuned, "linear_by", lambda way, *a: (fails if way.name == "folded" else right)(way, *a))
    entry, wrong, _ = measured(case, found, times(**{TODAY: 2.0}), rounds=1)
    assert (entry.way, wrong) == (TODAY, [])
    assert entry.refused == {"folded": "it does not run: out of resource: shared memory"}


def test_candidates_that_take_their_process_with_them_are_left_out_and_the_others_are_timed():
    case = Case("cut", **SIZES)
    with Child("injected:tunes") as child:
        entry, wrong, today = measured_apart(child, case, 3, 3.0)
    assert (entry.way, wrong, today, entry.key) == (TODAY, ["folded"], TODAY, case.key())
    assert entry.milliseconds.keys() == {TODAY} and entry.milliseconds[TODAY] > 0
    aborted = "it does not run: the process ended with signal SIGABRT"
    assert "from float64" in entry.refused.pop("folded")
    assert entry.refused == {
        "crashes": aborted, "hangs": "it does not run: it was not done after 3 s", "crashes late": aborted,
    }  # fmt: skip


def test_a_poisoned_context_ends_the_work_of_its_process(monkeypatch):
    """As after an illegal memory access, which every later call on the device would report."""

    def fails(*arguments):
        raise RuntimeError("illegal memory access")

    gpu = SimpleNamespace(device=torch.device("cuda", 0), regime="cut")
    monkeypatch.setattr(tuned, "Reference", lambda case: SimpleNamespace(problem=fails))
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    noted = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measured(gpu, dict.fromkeys(("first", "second")), None, 1, note=noted.append)
    assert noted == ["first"]


def test_a_case_in_a_child_has_the_entry_that_it_has_here():
    case = Case("search", **SIZES, keep=0.5)
    with Child(SERVED) as child:
        entry, wrong, today = measured_apart(child, case, 1, 60.0)
        assert entry.milliseconds.keys() == named(case).keys() and (wrong, today, entry.refused) == ([], TODAY, {})
        assert entry.key == case.key() and entry.way in entry.milliseconds
    with Child("injected:no_device") as child, pytest.raises(Lost, match="busy or unavailable"):
        measured_apart(child, case, 1, 60.0)


def test_on_a_gpu_the_command_goes_on_after_a_case_that_is_lost(home, monkeypatch, capsys):
    entry = Entry(Case("cut", **SIZES).key(), "native", None, {"native": 1.0}, {"folded": "it does not run: why"})
    said = iter([Measured(entry, [], "native"), Lost("it was not done after 9 s", "")])

    def one_of_two(child, case, rounds, seconds):
        assert (child.function, rounds, seconds) == (SERVED, 1, 9.0)
        found = next(said)
        if isinstance(found, Lost):
            raise found
        return found

    class Gpu(str):
        type = "cuda"

    monkeypatch.setattr(tune, "measured_apart", one_of_two)
    written = []
    monkeypatch.setattr(tune, "write", lambda path, device, entries: written.extend(entries))
    monkeypatch.setattr(tune, "_device", lambda name: Gpu("cuda:0"))
    monkeypatch.setattr(tune, "file_name", lambda device: "gpu.json")
    assert tune.main([*ARGUMENTS, "--regime", "cut", "search", "--timeout", "9"]) == 1
    told = capsys.readouterr()
    assert written == [entry] and "native 1.000 ms -> native (1.00x of today's native)" in told.out
    assert told.err.splitlines() == [
        "cut 24x28 r3 float32, 20 rows: folded is left out: it does not run: why",
        "search 24x28 r3 float32, 20 rows, 0.58 kept is left out: it was not done after 9 s",
    ]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv(table.ENVIRONMENT, str(tmp_path))
    table.tables_of.cache_clear()
    yield tmp_path
    table.tables_of.cache_clear()


QUICK = "--dtype float32 --device cpu --rounds 1".split()
ARGUMENTS = "--shapes 24x28 --tokens 20 --rank 3".split() + QUICK


def test_the_command_reports_what_is_wrong_and_says_so_in_its_status(home, wrong_fold, capsys):
    assert tune.main(ARGUMENTS) == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "is wrong" in line]
    assert len(lines) == 3 and lines[0].startswith("decision 24x28 r3 float32, 20 rows: folded is wrong: ")
    entries = json.loads(next(home.glob("*.json")).read_text())["entries"]
    folded = [entry for entry in entries if "folded" in table.ways_in(entry["key"]["regime"])]
    assert len(entries) == len(table.REGIMES) and len(folded) == 3
    assert all(entry["way"] != "folded" and entry["refused"] for entry in folded)


FRESH = """
import warnings; warnings.simplefilter("error")
import torch, atp_kernels
from atp_kernels.tuning.candidates import Case, SCALING
from atp_kernels.linear import definition
case = Case("cut", 20, 24, 28, 3, torch.float32, torch.device("cpu"))
given = case.operands()
y = atp_kernels.masked_lora_linear(*given[:4], scaling=SCALING)
assert torch.allclose(y, definition.masked_lora_linear(*given[:4], scaling=SCALING), atol=1e-4)
print(y.grad_fn.name())
print(atp_kernels.explain("masked_lora_linear", *given[:4]))
"""


def test_a_new_process_takes_the_winner_of_a_run_of_the_command(home, monkeypatch):
    monkeypatch.setattr(tune, "clock", lambda device: times(**{TODAY: 2.0, "folded": 1.0}))
    assert tune.main([*ARGUMENTS, "--regime", "cut"]) == 0
    variables = os.environ | {table.ENVIRONMENT: str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    function, explained = done.stdout.splitlines()
    assert function == "FoldedLoraLinearBackward"
    assert explained.endswith(
        f"M 20, N 24, K 28, r 3 runs on folded (the fastest for cut in {home / table.file_name(CPU)})."
    )


def test_the_command_with_the_real_clock_writes_every_case_of_a_model(home, capsys):
    assert tune.main("--model tiny --tokens 4 --rank 2".split() + QUICK) == 0
    (found,) = table.tables_of(CPU)
    assert {(entry.key.regime, entry.key.n, entry.key.k) for entry in found.entries} == {
        (regime, n, k) for regime in table.REGIMES for n, k in ((64, 64), (32, 64), (96, 64), (64, 96))
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"28 cases on cpu, into {found.path}" and len(lines) == 29
    today = {True: "sliced", False: TODAY}
    assert all(" ms -> " in line and f"of today's {today[line.startswith('kept')]})" in line for line in lines[1:])


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "one of the arguments --model --shapes is required"),
    (["--model", "nothing"], "unknown model 'nothing': use one of"),
    (["--shapes", "4096"], "'4096' is no shape: write out x in, such as 4096x11008"),
    (["--shapes", "0x4"], "'0x4' is no shape"),
    (["--shapes", "4x4", "--tokens", "0"], "--tokens is below 1"),
    (["--shapes", "4x4", "--rounds", "0"], "--rounds is below 1"),
    (["--shapes", "4x4", "--timeout", "0"], "the timeout is 0.0: give seconds above 0"),
    (["--shapes", "4x4", "--keep", "0"], "--keep must be above 0 and at most 1"),
    (["--shapes", "4x4", "--keep", "nan"], "--keep must be above 0 and at most 1"),
    (["--shapes", "4x4", "--folder", "/dev/null/tables"], "cannot be made (Not a directory): name another with --"),
    (["--shapes", "4x4", "--device", "toaster"], "--device 'toaster' is no device"),
    (["--shapes", "4x4", "--device", "meta"], "--device meta has no candidates"),
    (["--shapes", "4x4", "--device", "cuda:99"], "--device cuda:99 is not here"),
])  # fmt: skip
def test_what_is_wrong_with_the_arguments_is_said(home, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        tune.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert list(home.iterdir()) == []


CONFIG = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}  # fmt: skip
WHOLE = [(64, 64), (32, 64), (96, 64), (64, 96)]


@pytest.mark.parametrize(("change", "expected"), [
    ({}, WHOLE),
    ({"head_dim": 8}, [(32, 64), (16, 64), (64, 32), (96, 64), (64, 96)]),
    ({"num_key_value_heads": None}, [(64, 64), (96, 64), (64, 96)]),
    ({"per_layer_config": {"1": {"intermediate_size": 32}}}, [*WHOLE, (32, 64), (64, 32)]),
    ({"per_layer_config": {"0": {"intermediate_size": 48}, "1": {"intermediate_size": 32}}},
     [(64, 64), (32, 64), (48, 64), (64, 48), (32, 64), (64, 32)]),
])  # fmt: skip
def test_shapes_of_a_config(tmp_path, change, expected):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    expected = list(dict.fromkeys(expected))
    assert shapes.shapes_of(str(tmp_path)) == shapes.shapes_of(str(tmp_path / "config.json")) == expected


@pytest.mark.parametrize(("content", "said"), [
    ("{", "is not JSON"), ("[]", "is not the config of a model"), ("1" * 5000, "is not JSON"),
    ("{}", "has hidden_size None"), (json.dumps(CONFIG | {"hidden_size": "64"}), "has hidden_size '64'"),
    (json.dumps(CONFIG | {"intermediate_size": 0}), "has intermediate_size 0"),
    (json.dumps(CONFIG | {"per_layer_config": {"0": 3}}), "is not the config of a model"),
    (json.dumps(CONFIG | {"per_layer_config": 3}), "is not the config of a model"),
    (json.dumps(CONFIG | {"per_layer_config": {"0": {"qk_pairs": 3}}}), "has heads narrower than head_dim"),
])  # fmt: skip
def test_a_config_that_is_none_is_refused(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        shapes.shapes_of(str(path))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read .*: name a config.json or its folder"):
        shapes.shapes_of(str(tmp_path))
