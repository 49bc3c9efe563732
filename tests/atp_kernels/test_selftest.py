"""The self-test: what fails is passed over in this process, what was found is kept, no crash reaches the caller."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import injected
import pytest
import torch

import atp_kernels
from atp_kernels import call, extension, triton_runtime
from atp_kernels.call import OPERATIONS
from atp_kernels.selftest import Outcome, Untested, __main__, cases, outcomes, results, selftest, taken_over
from atp_kernels.tuning import table, tiled
from atp_kernels.tuning.table import Entry, Key

CPU = torch.device("cpu")
RIGHT = {op: Outcome("native", None, 0.5, 0.1) for op in OPERATIONS}
WRONG = RIGHT | {"rms_norm": Outcome("native", "it crashed", None, 0.0)}


@pytest.fixture(autouse=True)
def nothing_set_aside():
    yield
    call.set_aside("cpu", {})


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv(table.ENVIRONMENT, str(tmp_path / "tables"))
    return tmp_path / "tables"


@pytest.fixture(scope="module")
def failures():
    """What is found where operations crash, hang, raise and are wrong; two of the six are right."""
    return outcomes(CPU, fresh=True, timeout=3, tests="injected:operations_fail")


# What is found


def test_every_registered_operation_has_its_cases():
    assert cases.CASES.keys() == OPERATIONS.keys()


def native_is_taken(op):
    return call.select(op, CPU, torch.float32).name == "native"


@pytest.mark.parametrize("op", OPERATIONS)
def test_an_operation_is_right_here_and_well_within_its_bound(op):
    noted = []
    found = cases.tested({"op": op, "device": "cpu"}, noted.append)
    assert found["problem"] is None and found["error"] < 0.7
    assert found["backend"] == call.select(op, CPU, torch.bfloat16).name
    sizes = [f"in {dtype}, {rows} rows" for rows in (5, 256) for dtype in ("float32", "bfloat16")]
    assert all(any(note.endswith(size) for note in noted) for size in sizes)


def test_crash_hang_error_and_wrong_results_fail_the_operation_alone(failures):
    assert list(failures) == list(injected.OPERATIONS)
    said = {op: outcome.problem for op, outcome in failures.items()}
    assert said["rms_norm"] == "crashes: the process ended with signal SIGABRT"
    assert said["compact"] == "hangs: it was not done after 3 s"
    assert said["group_prox_"] == "raises: ValueError: no"
    for op in ("masked_lora_qkv", "masked_lora_swiglu"):
        assert re.fullmatch("soft mask in float32, 5 rows: .* is .* from float64, where .* is allowed", said[op])
    assert ": result 0 is nan from" in said["masked_lora_swiglu"]
    assert failures["masked_lora_qkv"].error > 1 and failures["masked_lora_swiglu"].error is None
    assert failures["rotary_embedding"].problem is None and 0 < failures["rotary_embedding"].error < 1


def broken_gradient(tensor, share):
    return tensor.detach() + share * (tensor - tensor.detach())


@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b", "soft_out", "soft_in"])
def test_an_error_in_any_gradient_is_found(monkeypatch, name):
    case = next(cases.CASES["masked_lora_linear"](cases.SIZES[0]))
    wrong = case._replace(call=lambda t: case.call(t | {name: broken_gradient(t[name], 1.01)}))
    monkeypatch.setitem(cases.CASES, "masked_lora_linear", lambda sizes: [wrong])
    found = cases.tested({"op": "masked_lora_linear", "device": "cpu"}, lambda at: None)
    assert f"the gradient of {name} is " in found["problem"]


def test_an_error_in_a_result_is_found_where_gradients_are_right(monkeypatch):
    case = next(cases.CASES["lora_dropout"](cases.SIZES[0]))
    wrong = case._replace(call=lambda t: tuple(part + 0.1 for part in case.call(t)))
    monkeypatch.setitem(cases.CASES, "lora_dropout", lambda sizes: [wrong])
    found = cases.tested({"op": "lora_dropout", "device": "cpu"}, lambda at: None)
    assert ": result 0 is " in found["problem"] and found["error"] > 1


@pytest.mark.parametrize("op", ["group_lasso_grad_", "group_prox_", "cross_entropy_"])
def test_what_is_written_in_place_is_looked_at(monkeypatch, op):
    for case in cases.CASES[op](cases.SIZES[0]):
        for place in range(len(case.call(cases._drawn(case, torch.float32, CPU)))):

            def wrong(t, case=case, place=place):
                return tuple(part * (1.01 if i == place else 1) for i, part in enumerate(case.call(t)))

            monkeypatch.setitem(cases.CASES, op, lambda sizes, case=case, wrong=wrong: [case._replace(call=wrong)])
            found = cases.tested({"op": op, "device": "cpu"}, lambda at: None)
            assert f"result {place} is " in found["problem"]


@pytest.mark.parametrize(("tests", "why"), [
    ("no_device", "RuntimeError: CUDA-capable device"), ("no_memory", "there is no memory for compact on cpu"),
])  # fmt: skip
def test_a_device_that_cannot_be_used_says_nothing_about_kernels(home, tests, why):
    with pytest.raises(Untested, match=why):
        outcomes(CPU, tests=f"injected:{tests}")
    assert not home.exists()


@pytest.mark.parametrize(("device", "said"), [("toaster", "is no device"), ("cuda:99", "cuda:99 is not here")])
def test_a_device_that_is_not_here_is_refused(device, said):
    with pytest.raises(ValueError, match=said):
        selftest(device)


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
def test_a_time_that_is_none_is_refused(timeout):
    with pytest.raises(ValueError, match="give seconds above 0, at most 86,400"):
        selftest("cpu", timeout=timeout)


# What this process makes of it


def shown(op, dtype=torch.float32):
    return atp_kernels.explain(op, torch.ones(1, dtype=dtype))


def test_what_failed_is_computed_by_the_reference_with_one_warning_each(failures):
    with pytest.warns(RuntimeWarning) as warned:
        assert taken_over(failures, CPU) == {op: outcome.problem for op, outcome in failures.items()}
    said = [str(warning.message) for warning in warned]
    assert len(said) == 5 and all("\n" not in line for line in said)
    name = failures["rms_norm"].backend
    assert said[0] == (
        "rms_norm failed the self-test on cpu and is computed by reference in this process "
        f"({name}: crashes: the process ended with signal SIGABRT); "
        "`python -m atp_kernels.selftest --fresh` tests again."
    )
    for op in ("rms_norm", "compact", "group_prox_", "masked_lora_swiglu"):
        backend, problem = failures[op].backend, failures[op].problem
        assert call.select(op, CPU, torch.bfloat16)[1:] == ("reference", f"{backend} failed the self-test: {problem}")
    assert shown("compact").endswith(
        "runs on reference (native failed the self-test: hangs: it was not done after 3 s)."
    )


@pytest.mark.skipif(not native_is_taken("compact"), reason="is about the extension")
def test_what_is_right_and_what_is_named_stays(failures, monkeypatch, request):
    with pytest.warns(RuntimeWarning):
        taken_over(failures, CPU)
    assert call.select("cross_entropy_", CPU, torch.float32).name == "native"
    assert call.select("compact", CPU, torch.float32, "native").name == "native"
    assert call.select("compact", torch.device("cuda"), torch.float32).why.find("self-test") == -1
    request.addfinalizer(call.override.cache_clear)
    monkeypatch.setenv(call.ENVIRONMENT, "native")
    call.override.cache_clear()
    assert call.select("compact", CPU, torch.float32).name == "native"


@pytest.mark.parametrize("op", ["masked_lora_qkv", "masked_lora_linear"])
def test_operations_of_the_same_kernels_are_set_aside_together(op):
    """A call of qkv asks for the backend of its linears."""
    call.set_aside("cpu", {op: "it is wrong"})
    for each in ("masked_lora_qkv", "masked_lora_linear"):
        assert call.select(each, CPU, torch.float32)[1:] == ("reference", "it is wrong")


def test_calls_that_were_made_before_are_computed_otherwise_after(monkeypatch):
    """And the other way round: what a later test finds right is taken again."""
    x, weight = torch.ones(2, 4), torch.ones(4)
    before = call.select("rms_norm", CPU, torch.float32).name
    atp_kernels.rms_norm(x, weight, eps=1e-6)
    call.set_aside("cpu", {"rms_norm": "it is wrong"})
    asked = []
    reference = call.select("rms_norm", CPU, torch.float32).module
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a: asked.append("reference") or forward(*a))
    atp_kernels.rms_norm(x, weight, eps=1e-6)
    assert asked == ["reference"]
    taken_over(RIGHT, CPU)
    assert call.select("rms_norm", CPU, torch.float32).name == before


@pytest.mark.skipif(not native_is_taken("compact"), reason="is about the extension")
def test_a_tuned_table_does_not_bring_back_what_failed(home, request):
    request.addfinalizer(table.tables_of.cache_clear)
    request.addfinalizer(tiled._followed.cache_clear)
    key = Key("cut", "float32", 12, 8, 8, 2)
    path = home / table.file_name(CPU)
    table.write(path, CPU, [Entry(key, "native", None, {"native": 1.0})])
    tensors = [torch.ones(size) for size in ((12, 8), (8, 8), (2, 8), (8, 2))]
    assert f"runs on native (the fastest for cut in {path})" in atp_kernels.explain("masked_lora_linear", *tensors)
    call.set_aside("cpu", {"masked_lora_linear": "it is wrong"})
    assert "runs on reference (it is wrong" in atp_kernels.explain("masked_lora_linear", *tensors)


def test_where_the_reference_itself_fails_nothing_else_is_promised():
    with pytest.warns(RuntimeWarning, match=r"rms_norm failed the self-test on cpu \(reference: it is wrong\)"):
        taken_over({"rms_norm": Outcome("reference", "it is wrong", 3.0, 0.1)}, CPU)
    assert call.select("rms_norm", CPU, torch.float32).name == "reference"


# What is kept


@pytest.fixture
def times(home, monkeypatch):
    """How often something was tested so far, after another look."""
    tested = []
    monkeypatch.setattr(sys.modules["atp_kernels.selftest"], "_found", lambda *a: tested.append(a) or RIGHT)

    def looked(**options):
        assert outcomes(CPU, **options) == RIGHT
        return len(tested)

    return looked


def test_what_was_found_is_read_until_a_version_changes(times, home, monkeypatch):
    assert [times(), times(), times(fresh=True), times()] == [1, 1, 2, 2]
    (path,) = home.iterdir()
    assert path.name == f"selftest-{table.file_name(CPU)}"
    kept = path.read_bytes()
    for place, name, value in (
        (torch, "__version__", "0.1"), (triton_runtime, "VERSION", "0.1"), (results, "_kernels", lambda: "0.1"),
        (results, "device_name", lambda device: "another"), (results, "FORMAT", 0),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert results.read(CPU) is None, name
    assert results.read(CPU) is not None and path.read_bytes() == kept


def test_kernels_are_those_of_every_source_file_and_of_the_extension(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_PACKAGE", tmp_path)
    found = []

    def changes():
        found.append(results._kernels())
        return found.count(found[-1]) == 1

    (tmp_path / "room").mkdir()
    assert changes()
    (tmp_path / "room" / "triton.py").write_text("1")
    assert changes()
    (tmp_path / "room" / "bench.py").write_text("1")  # computes nothing
    assert not changes()
    for binary in (tmp_path / "room" / "triton.py", None):
        monkeypatch.setattr(extension, "binary", lambda binary=binary: binary)
        monkeypatch.setattr(extension, "AVAILABLE", binary is not None)
        assert changes()


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"\xff", b"null",
    pytest.param(None, id="cut short"), pytest.param({"compact": None}, id="an operation without outcome"),
    pytest.param({"compact": ["native", 3, 0.5, 0.1]}, id="a problem that is none"),
    pytest.param({"compact": ["native", None, -1.0, 0.1]}, id="an error below zero"),
    pytest.param({"compact": ["native", None, float("nan"), 0.1]}, id="an error that is no number"),
    pytest.param({"unknown": ["native", None, 0.5, 0.1]}, id="an unknown operation"),
])  # fmt: skip
def test_a_damaged_file_is_none_and_is_replaced(home, content):
    whole = {op: list(outcome) for op, outcome in RIGHT.items()}
    results.write(CPU, whole)
    (path,) = home.iterdir()
    if content is None:
        content = path.read_bytes()[:-20]
    elif isinstance(content, dict):
        kept = json.loads(path.read_text())
        content = json.dumps(kept | {"outcomes": kept["outcomes"] | content}).encode()
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert results.read(CPU) is None
        results.write(CPU, whole)
    assert results.read(CPU) == whole and list(home.iterdir()) == [path]


@pytest.mark.parametrize("made", ["a file in its place", "not to be written to"])
def test_a_folder_that_takes_nothing_costs_a_warning(times, home, monkeypatch, made):
    if made == "a file in its place":
        home.write_text("no folder")
    else:

        def refused(*arguments, **options):  # root may write to any folder
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(results, "replace_file", refused)
    with pytest.warns(RuntimeWarning, match=r"What the self-test found cannot be kept in .*ATP_KERNELS_TABLES"):
        assert times() == 1
    with pytest.warns(RuntimeWarning):
        assert times() == 2


def test_nothing_is_kept_where_tables_are_off(monkeypatch):
    monkeypatch.setenv(table.ENVIRONMENT, os.devnull)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.write(CPU, {})
        assert results.read(CPU) is None


def test_a_failure_is_known_to_the_next_process_too(home):
    results.write(CPU, {op: list(outcome) for op, outcome in WRONG.items()})
    with pytest.warns(RuntimeWarning, match="rms_norm failed the self-test on cpu"):
        assert selftest("cpu")["rms_norm"] == "it crashed"
    assert call.select("rms_norm", CPU, torch.float32).name == "reference"


# The command


def test_the_command_tests_every_operation_and_two_at_once_keep_a_whole_file(home):
    command = [sys.executable, "-m", "atp_kernels.selftest", "--device", "cpu"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        said, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        *lines, last = said.splitlines()
        assert [line.split()[0] for line in lines] == list(OPERATIONS)
        assert all(line.endswith(" ok") for line in lines)
        assert last.startswith(f"{len(OPERATIONS)} of {len(OPERATIONS)} operations are right on cpu (")
    assert [path.name for path in home.iterdir()] == [results.path_of(CPU).name]
    assert {op: found[0] for op, found in results.read(CPU).items()} == {
        op: call.select(op, CPU, torch.bfloat16).name for op in OPERATIONS
    }


def test_the_command_says_what_failed_and_ends_with_status_1(home, capsys):
    results.write(CPU, {op: list(outcome) for op, outcome in WRONG.items()})
    assert __main__.main(["--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (failed,) = [line for line in lines if "FAILED" in line]
    assert failed.split()[:4] == ["rms_norm", "native", "error", "-"] and failed.endswith("s  FAILED: it crashed")
    assert lines[-1].startswith(f"{len(OPERATIONS) - 1} of {len(OPERATIONS)} operations are right")


def test_the_command_says_that_a_device_cannot_be_used(monkeypatch, capsys):
    def untested(*arguments, **options):
        raise Untested("there is no memory")

    monkeypatch.setattr(__main__, "outcomes", untested)
    assert __main__.main(["--device", "cpu"]) == 1
    assert capsys.readouterr().err == "The kernels were not tested on cpu: there is no memory.\n"


@pytest.mark.parametrize(("arguments", "said"), [
    (["--device", "cuda:99"], "cuda:99 is not here"), (["--timeout", "nan"], "the timeout is nan: give seconds"),
])  # fmt: skip
def test_what_is_wrong_with_the_arguments_is_said(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        __main__.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_package_does_not_import_tests_or_benchmarks():
    texts = [path.read_text() for path in Path(cases.__file__).parent.glob("*.py")]
    assert texts and not any(word in text for text in texts for word in ("benchmarks", "operation_cases"))
