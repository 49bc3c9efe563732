"""Tuned tables: what they say for a call, and that no file, however bad, stops one."""

import json
import multiprocessing
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tables_here import tables_in

import atp_kernels
from atp_kernels import extension, masked_lora_linear
from atp_kernels.linear import definition
from atp_kernels.tuning import table
from atp_kernels.tuning.table import Entry, Key, Table

CPU = torch.device("cpu")
N, K, R = 44, 52, 4
KEY = Key("cut", "float32", 12, N, K, R)
ENTRY = Entry(KEY, "folded", None, {"native": 2.0, "folded": 1.0})
TAKEN = {"folded": "FoldedLoraLinearBackward", "sliced": "KeptLoraLinearBackward", "reference": "LoraLinearBackward"}


@pytest.fixture
def path(tmp_path):
    with tables_in(tmp_path) as place:
        yield place


def operands(rows=12, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(size, generator=rng).to(dtype)  # noqa: E731
    x, weight, lora_a, lora_b = randn(rows, K), randn(N, K) / 7, randn(R, K) / 7, randn(N, R)
    return x.requires_grad_(), weight, lora_a.requires_grad_(), lora_b.requires_grad_()


def taken(*tensors, **options):
    """The Function of a call, after its result and gradients were compared with the definition."""
    y = masked_lora_linear(*tensors, scaling=0.5, **options)
    exact = definition.masked_lora_linear(*tensors, scaling=0.5, **options)
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
    wanted = [each for each in (*tensors, *options.values()) if isinstance(each, torch.Tensor) and each.requires_grad]
    grads, expected = (torch.autograd.grad(each.square().sum(), wanted) for each in (y, exact))
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-3)
    return y.grad_fn.name()


def test_a_table_is_read_back_as_it_was_written(path):
    entries = [
        ENTRY,
        Entry(replace(KEY, regime="search", kept=0.6), "sliced", None, {"sliced": 0.5}, {"folded": "it is wrong"}),
        Entry(replace(KEY, m=99), "triton", (64, 64, 32, 4, 3), {"triton 64x64x32x4x3": 0.25}),
    ]
    table.write(path, CPU, entries[:2])
    table.write(path, CPU, entries[2:])
    (found,) = table.tables_of(CPU)
    assert found.path == path and list(found.entries) == entries


def test_a_new_measurement_replaces_that_of_its_key_alone(path):
    other = replace(ENTRY, key=replace(KEY, r=8))
    table.write(path, CPU, [ENTRY, other])
    table.write(path, CPU, [replace(ENTRY, way="native")])
    (found,) = table.tables_of(CPU)
    assert [entry.way for entry in found.entries] == ["native", "folded"]


@pytest.mark.parametrize("way", ["folded", "reference"])
def test_a_call_without_masks_goes_the_way_of_its_entry(path, way):
    table.write(path, CPU, [replace(ENTRY, way=way)])
    assert taken(*operands()) == TAKEN[way]
    explained = atp_kernels.explain("masked_lora_linear", *operands())
    assert explained == (
        f"masked_lora_linear on cpu in float32 with M 12, N {N}, K {K}, r {R} runs on {way} "
        f"(the fastest for cut in {path})."
    )


def test_a_decision_step_goes_the_way_of_its_entry(path):
    table.write(path, CPU, [replace(ENTRY, key=replace(KEY, regime="decision"))])
    x, weight, lora_a, lora_b = operands()
    frozen = x, weight, lora_a.detach(), lora_b.detach()
    soft = {"out_mask": torch.rand(N, requires_grad=True), "mask_lora": True}
    assert taken(*frozen, **soft) == TAKEN["folded"]
    # Factors that learn are another regime, for which there is no entry.
    assert taken(x, weight, lora_a, lora_b, **soft) == "MaskedLoraLinearBackward"
    explained = atp_kernels.explain("masked_lora_linear", x, weight, lora_a, lora_b, **soft)
    assert f"; nothing for this call in {path})." in explained


@pytest.mark.parametrize(("way", "timed_with", "taken_below", "taken_above"), [
    ("sliced", 0.5, "KeptLoraLinearBackward", "MaskedLoraLinearBackward"),
    ("folded", 0.5, "MaskedLoraLinearBackward", "FoldedLoraLinearBackward"),
])  # fmt: skip
def test_a_search_step_goes_it_on_the_side_of_the_share_on_which_it_won(
    path, way, timed_with, taken_below, taken_above
):
    table.write(path, CPU, [replace(ENTRY, way=way, key=replace(KEY, regime="search", kept=timed_with))])
    for kept, expected in ((11, taken_below), (22, TAKEN[way]), (33, taken_above)):
        assert taken(*operands(), out_mask=torch.arange(N) < kept) == expected


@pytest.mark.parametrize("options", [
    {"backend": "reference"}, {"dropout": 0.5, "seed": 1}, {"lora_input": torch.ones(12, K)},
    {"in_mask": torch.rand(K)}, {"out_mask": torch.rand(N), "mask_lora": True},
])  # fmt: skip
def test_calls_of_other_kinds_do_not_ask_the_table(path, options):
    keys = [
        replace(KEY, regime=regime, kept=kept) for regime, kept in (("cut", 1.0), ("decision", 1.0), ("search", 0.0))
    ]
    table.write(path, CPU, [replace(ENTRY, key=key) for key in keys])
    y = masked_lora_linear(*operands(), scaling=0.5, **options)
    assert y.grad_fn.name() in ("MaskedLoraLinearBackward", "LoraLinearBackward")


def test_an_environment_that_names_a_backend_goes_before_a_table(path, monkeypatch, request):
    request.addfinalizer(atp_kernels.call.override.cache_clear)
    table.write(path, CPU, [ENTRY])
    monkeypatch.setenv("ATP_KERNELS_BACKEND", "reference")
    atp_kernels.call.override.cache_clear()
    assert taken(*operands()) == "LoraLinearBackward"


@pytest.mark.parametrize(("rows", "found"), [(5, False), (6, True), (24, True), (25, False)])
def test_an_entry_speaks_for_half_to_twice_its_rows(path, rows, found):
    table.write(path, CPU, [ENTRY])
    assert (taken(*operands(rows)) == TAKEN["folded"]) == found


def test_the_nearest_rows_decide():
    near, far = replace(ENTRY, key=replace(KEY, m=100)), replace(ENTRY, key=replace(KEY, m=160), way="native")
    found = Table(Path(), [far, near])
    assert [found.find(replace(KEY, m=m)).way for m in (120, 130)] == ["folded", "native"]
    for other in ({"dtype": "bfloat16"}, {"n": 45}, {"k": 45}, {"r": 8}, {"regime": "decision"}):
        assert found.find(replace(KEY, m=100, **other)) is None


def test_the_user_s_table_goes_before_that_of_the_package(path):
    shipped = table.SHIPPED / path.name
    table.write(shipped, CPU, [ENTRY, replace(ENTRY, key=replace(KEY, m=1000))])
    assert taken(*operands()) == TAKEN["folded"]
    table.write(path, CPU, [replace(ENTRY, way="reference")])
    assert taken(*operands()) == TAKEN["reference"]
    assert taken(*operands(1000)) == TAKEN["folded"]


KEY_OF = asdict(KEY)
IN_ENTRY = {
    "an unknown way": {"way": "magic"},
    "a way of slices": {"way": "zeroed"},
    "a list for a way": {"way": ["folded"]},
    "a tile of no Triton": {"tile": [64, 64, 32, 4, 3]},
    "a name of a tile of no Triton": {"tile": "128x128x64"},
    "a tile that is a number": {"way": "triton", "tile": 7},
    **{
        f"a tile of {tile}": {"way": "triton", "tile": tile}
        for tile in (
            [64, 64],
            [64, 48, 32, 4, 3],
            [64, 8, 32, 4, 3],
            [64, 512, 32, 4, 3],
            [-64, 64, 32, 4, 3],
            [64, 64, 32, 3, 3],
            [64, 64, 32, 32, 3],
            [64, 64, 32, 4, 0],
            [64, 64, 32, 4, 9],
            [64, 64, 32, 4, 3.0],
        )  # too few, odd, too small, too large, negative; warps; stages
    },  # fmt: skip
    "times that are text": {"milliseconds": {"folded": "1"}},
    "a negative time": {"milliseconds": {"folded": -1.0}},
    "times that are a list": {"milliseconds": [1.0]},
    "reasons that are text": {"refused": "no"},
    "a slice by a backend": {"key": KEY_OF | {"regime": "kept_in"}},
    "a folded slice": {"key": KEY_OF | {"regime": "first_in"}},
    "an unknown key": {"key": KEY_OF | {"colour": 1}},
    "an unknown regime": {"key": KEY_OF | {"regime": "other"}},
    "rows of zero": {"key": KEY_OF | {"m": 0}},
    "rows that are true": {"key": KEY_OF | {"m": True}},
    "a share above one": {"key": KEY_OF | {"kept": 1.5}},
    "a dtype that is a list": {"key": KEY_OF | {"dtype": []}},
}
ANOTHER = {
    "another device": ({"device": "NVIDIA H100"}, "its device is 'NVIDIA H100' and here it is "),
    "another torch": ({"torch": "1.0"}, "its torch is '1.0' and here it is "),
    "other kernels": ({"kernels": "0.0.1"}, "its kernels is '0.0.1' and here it is "),
    "another format": ({"format": 2}, "its format is 2 and here it is 1"),
    "no entries": ({"entries": None}, "it has no list of entries"),
    "an entry that is a number": ({"entries": [3]}, "entry 0 of it is not"),
}


def warned_once(path, reason):
    """Two calls warn once in one sentence, and go the way of today."""
    table.tables_of.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert taken(*operands()) == taken(*operands()) == "LoraLinearBackward"
    (message,) = [str(each.message) for each in caught]
    assert message.startswith(f"The tuned table {path} is ignored, since {reason}"), message
    assert message.endswith("; `python -m atp_kernels.tune` writes a new one.") and message.count(". ") == 0


@pytest.mark.parametrize("case", [*ANOTHER, *IN_ENTRY, "an entry cut short"])
def test_a_foreign_or_partial_table_is_ignored_with_one_warning_and_replaced(path, case):
    change, reason = ANOTHER.get(case, ({}, "entry 0 of it is not"))
    table.write(path, CPU, [ENTRY])
    content = json.loads(path.read_text()) | change
    if case not in ANOTHER:
        content["entries"][0] |= IN_ENTRY.get(case, {})
    if case == "an entry cut short":
        del content["entries"][0]["milliseconds"]
    path.write_text(json.dumps(content))
    warned_once(path, reason)
    table.write(path, CPU, [ENTRY])
    assert taken(*operands()) == TAKEN["folded"]


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b'{"entries": []}', b"NaN", b"1" * 5000,
])  # fmt: skip
def test_a_damaged_file_is_ignored_with_one_warning(path, content):
    path.write_bytes(content)
    warned_once(path, "it")


def test_a_file_cut_short_anywhere_is_ignored(path):
    table.write(path, CPU, [ENTRY])
    whole = path.read_bytes()
    for end in range(0, len(whole) - 2, 37):
        path.write_bytes(whole[:end])
        with pytest.warns(RuntimeWarning, match="is not whole JSON"):
            assert table.read(path, CPU) is None


def test_a_file_that_is_too_large_or_unreadable_is_ignored(path, monkeypatch):
    table.write(path, CPU, [ENTRY])
    monkeypatch.setattr(table, "_LARGEST_FILE", 10)
    warned_once(path, "it is larger than 10 bytes")
    monkeypatch.undo()
    (path.parent / "other").mkdir()
    with pytest.warns(RuntimeWarning, match="it cannot be read"):
        assert table.read(path.parent / "other", CPU) is None


def test_on_a_cpu_a_table_is_of_the_extension_that_was_timed(tmp_path, monkeypatch):
    """On a GPU it fits every build of it, as one that comes with the package must."""
    builds = [tmp_path / "first", tmp_path / "second", None]
    for build in builds[:2]:
        build.write_text(build.name)
    found = {"cpu": set(), "cuda": set()}
    for build in builds:
        monkeypatch.setattr(extension, "binary", lambda build=build: build)
        for device_type, kernels in found.items():
            kernels.add(table._kernels.__wrapped__(device_type))
    assert (len(found["cpu"]), len(found["cuda"])) == (3, 1)
    monkeypatch.setattr(extension, "binary", lambda: tmp_path / "replaced by now")
    assert table._kernels.__wrapped__("cpu") in found["cpu"]


def test_the_extension_s_file_is_named_where_there_is_one():
    binary = extension.binary()
    assert (binary is not None) == extension.AVAILABLE
    assert binary is None or (binary.is_file() and binary.name.startswith("_C"))


def test_a_backend_that_is_not_here_is_not_followed(path):
    table.write(path, CPU, [replace(ENTRY, key=replace(KEY, dtype="float64"), way="native")])
    with pytest.warns(RuntimeWarning, match="A tuned table is not followed: .*'native' cannot take"):
        assert taken(*operands(dtype=torch.float64)) == "LoraLinearBackward"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken(*operands(dtype=torch.float64)) == "LoraLinearBackward"


@pytest.mark.parametrize(("variables", "expected"), [
    ({"ATP_KERNELS_TABLES": "/named", "XDG_CACHE_HOME": "/cache"}, "/named"),
    ({"ATP_KERNELS_TABLES": "", "XDG_CACHE_HOME": "/cache"}, "/cache/atp_kernels"),
    ({"XDG_CACHE_HOME": "not/absolute", "HOME": "/home/me"}, "/home/me/.cache/atp_kernels"),
    ({"HOME": "/home/me"}, "/home/me/.cache/atp_kernels"),
])  # fmt: skip
def test_where_the_user_s_tables_lie(monkeypatch, variables, expected):
    for name in ("ATP_KERNELS_TABLES", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert table.folder() == Path(expected)


def test_a_failed_write_leaves_the_old_table_and_nothing_beside_it(path, monkeypatch):
    table.write(path, CPU, [ENTRY])
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        table.write(path, CPU, [replace(ENTRY, way="native")])
    assert path.read_bytes() == before
    assert {each.name for each in path.parent.iterdir()} == {path.name, path.with_suffix(".lock").name}


def _write_many(path, first):
    for m in range(first, first + 20):
        table.write(path, CPU, [replace(ENTRY, key=replace(KEY, m=m))])


def test_two_processes_write_one_table(path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(path, first)) for first in (1, 101)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = table.read(path, CPU)
    assert {entry.key.m for entry in found.entries} == {*range(1, 21), *range(101, 121)}


def test_names_of_files_tell_devices_apart(monkeypatch):
    monkeypatch.setattr(table, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert table.file_name(torch.device("cuda", 1)) == "cuda-nvidia-h100-80gb-hbm3.json"
    assert table.tables_of(torch.device("meta")) == ()
