"""Checkpoints survive crashes, torn files and a missing pointer."""

import itertools
import json
import os
import shutil

import pytest
import torch

from atp.ground import files
from atp.ground.errors import InputError
from atp.training import checkpoint as checkpoints
from atp.training.checkpoint import (
    Checkpoint,
    load,
    load_optimizer_tensors,
    newest,
    optimizer_tensors,
    resume_point,
    save,
)


def state(step):
    shared = torch.arange(12.0).view(3, 4)
    tensors = {
        "model.a": torch.full((2, 3), float(step)),
        "model.b": torch.arange(4, dtype=torch.bfloat16),
        "generator.a": torch.zeros(()),
        "mask": torch.tensor([True, False]),
        "rng.cpu": torch.get_rng_state(),
        "shared": shared, "transposed": shared.T, "strided": shared[:, 1],
    }  # fmt: skip
    return Checkpoint(step, tensors, {"frozen": False, "clock": {"search": 1.5}})


def two(root):
    """Checkpoints 1 and 2, and the folder of the second."""
    save(root, state(1), keep=3)
    return save(root, state(2), keep=3)


def folders(root):
    return sorted(p.name for p in root.iterdir() if p.is_dir())


def tear(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_round_trip(tmp_path):
    written = state(5)
    folder = save(tmp_path, written, keep=2)
    read = load(folder)
    assert newest(tmp_path) == folder
    assert (read.step, read.meta) == (written.step, written.meta)
    assert read.tensors.keys() == written.tensors.keys()
    for name, tensor in read.tensors.items():
        assert tensor.dtype == written.tensors[name].dtype and torch.equal(tensor, written.tensors[name])
    assert set(read.part("model")) == {"a", "b"} and set(read.part("mod")) == set()


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, state(step), keep=2)
    assert folders(tmp_path) == ["checkpoint-00000003", "checkpoint-00000010"]
    assert load(newest(tmp_path)).step == 10


def test_same_step_is_replaced(tmp_path):
    save(tmp_path, state(4), keep=2)
    again = state(4)
    again.tensors["model.a"] += 1
    save(tmp_path, again, keep=2)
    assert folders(tmp_path) == ["checkpoint-00000004"]
    assert torch.equal(load(newest(tmp_path)).tensors["model.a"], again.tensors["model.a"])


@pytest.mark.parametrize(
    ("module", "victim"),
    [(checkpoints, "save_file"), (checkpoints, "sha256"), (files, "flush"), (os, "replace"),
     (checkpoints, "write_text"), (checkpoints, "_prune")],
)  # fmt: skip
@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_while_saving_leaves_a_complete_newest(tmp_path, monkeypatch, module, victim, keep):
    save(tmp_path, state(1), keep=keep)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, victim, crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, state(2), keep=keep)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".writing-*"))
    survivor = load(newest(tmp_path))
    assert survivor.step == (2 if victim == "_prune" else 1)
    save(tmp_path, state(2), keep=keep)
    assert load(newest(tmp_path)).step == 2


def test_pointer_wins_over_a_higher_step(tmp_path):
    """After resuming from an older step the newest is the one written last."""
    for step in (8, 9):
        save(tmp_path, state(step), keep=3)
    save(tmp_path, state(7), keep=3)
    assert load(newest(tmp_path)).step == 7


def test_nothing_to_resume(tmp_path):
    assert newest(tmp_path / "absent") is None
    assert newest(tmp_path) is None
    save(tmp_path, state(1), keep=1)
    shutil.rmtree(tmp_path / "checkpoint-00000001")
    with pytest.raises(InputError, match="is intact"):  # a pointer without any checkpoint is no fresh start
        resume_point(tmp_path, print)


def forge(path):
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"values": meta["values"] | {"clock": {"search": 9.0}}}))


def binary(path):
    path.write_bytes(b"\xff\xfe\x00\x80")


def swap_steps(path):
    other = path.parents[1] / "checkpoint-00000001" / path.name
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGE = [
    binary, tear, flip, os.remove,
    *(lambda path, text=text: path.write_text(text) for text in ("[]", "null", "3", '"x"', "{}", "[" * 100_000)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "damage"),
    [("state.json", forge), *itertools.product(["state.json", "state.safetensors"], DAMAGE)],
)
def test_whatever_the_damage_the_checkpoint_before_is_used_and_named(tmp_path, name, damage):
    folder, said = two(tmp_path), []
    damage(folder / name)
    with pytest.raises(InputError, match=rf"checkpoint-00000002 is damaged \({name} .*\): resume from an older"):
        load(folder)
    assert load(newest(tmp_path)).step == 1
    assert load(resume_point(tmp_path, said.append)).step == 1
    assert len(said) == 1 and "checkpoint-00000002" in said[0] and name in said[0] and len(said[0]) < 500
    damage(tmp_path / "checkpoint-00000001" / name)
    assert newest(tmp_path) is None
    with pytest.raises(InputError, match=r"^no checkpoint in .* is intact \(.*\): start again in another output_dir$"):
        resume_point(tmp_path, said.append)
    assert len(said) == 1


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_files_of_two_checkpoints_are_not_mixed(tmp_path, name):
    swap_steps(two(tmp_path) / name)
    assert newest(tmp_path) is None


def test_a_checkpoint_under_another_name_is_damage(tmp_path):
    two(tmp_path)
    (tmp_path / "checkpoint-00000001").rename(tmp_path / "checkpoint-00000007")
    said = []
    (tmp_path / "LATEST").write_text("checkpoint-00000007")
    assert load(resume_point(tmp_path, said.append)).step == 2
    assert "checkpoint-00000007, state.json is of step 1" in said[0]


@pytest.mark.parametrize(
    "content",
    [None, b"checkpoint-00000009\n", b"\xff\xfe\x00", b"", b"../elsewhere", b"checkpoint-\x00", b"x" * 5000],
)
def test_a_damaged_pointer_is_named_and_does_not_matter(tmp_path, content):
    two(tmp_path)
    pointer, said = tmp_path / "LATEST", []
    pointer.unlink() if content is None else pointer.write_bytes(content)
    assert load(newest(tmp_path)).step == load(resume_point(tmp_path, said.append)).step == 2
    assert [line.partition(": ")[2].partition(" ")[0] for line in said] == ([] if content is None else ["LATEST"])


def of_format(folder, number):
    """Rewrites an intact checkpoint as one of another format, as it would have been written."""
    path = folder / "state.json"
    meta = json.loads(path.read_text())
    del meta["checksum"], meta["format"]
    meta |= {} if number is None else {"format": number}
    path.write_text(json.dumps(meta | {"checksum": checkpoints._checksum(meta)}))


@pytest.mark.parametrize("number", [None, 1, checkpoints.FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused_and_no_older_one_taken(tmp_path, number):
    folder = two(tmp_path)
    of_format(folder, number)
    found = rf"checkpoint-00000002 has format {number or 1} and this version of ATP reads format {checkpoints.FORMAT}: "
    for read in (lambda: load(folder), lambda: resume_point(tmp_path, print)):
        with pytest.raises(InputError, match=found + "finish the run with the version that started it, or start again"):
            read()


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path, state(1), keep=1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    for step in (2, 3):
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, state(step), keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"LATEST", "checkpoint-00000001"}


def test_damaged_later_checkpoints_do_not_push_out_intact_ones(tmp_path):
    """The torn 10 must not count among the two that are kept, or one more loss would be the end."""
    for step in (7, 8, 10):
        save(tmp_path, state(step), keep=3)
    tear(tmp_path / "checkpoint-00000010" / "state.safetensors")
    save(tmp_path, state(9), keep=2)
    assert folders(tmp_path) == ["checkpoint-00000008", "checkpoint-00000009"]
    assert load(newest(tmp_path)).step == 9


def trained(steps, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    model(torch.linspace(-1, 1, 6).view(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_optimizer_goes_on_exactly(tmp_path):
    model, optimizer = trained(3)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer_tensors(trained(0)[1], names) == {}
    tensors = optimizer_tensors(optimizer, names)
    assert set(tensors) == {f"{n}.{key}" for n in names for key in ("step", "exp_avg", "exp_avg_sq")}
    read = load(save(tmp_path, Checkpoint(3, tensors, {}), keep=1)).tensors
    other, fresh = trained(0, seed=1)
    other.load_state_dict(model.state_dict())
    fresh.param_groups[0]["lr"] = 0.05
    load_optimizer_tensors(fresh, names, read)
    assert fresh.param_groups[0]["lr"] == 0.05, "group options stay as they are"
    fresh.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        step(model, optimizer)
        step(other, fresh)
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name
