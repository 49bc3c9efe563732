"""Checkpoints damaged at random, and whether the one before is taken and the damage named."""

import json
import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field

import torch

from atp.ground.errors import InputError
from atp.training.checkpoint import load, resume_point

FILES = ("state.safetensors", "state.json")
_ODD = ("", "[]", "null", "3", '"x"', "{}", "[" * 20_000, '{"step": 1e999}', "\ud800".encode("utf-16", "surrogatepass"))


def flip(path, draw):
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def swap(path, draw):
    others = [p for p in path.parents[1].glob(f"checkpoint-*/{path.name}") if p != path and p.is_file()]
    if others:
        other = draw.choice(others)
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)


def odd(path, draw):
    content = draw.choice(_ODD)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def odd_value(path, draw):
    """A value of another type, or another number, somewhere in the JSON."""
    path = path.with_name("state.json")
    try:
        at = values = json.loads(path.read_text())
        while isinstance(at, dict) and at:
            key = draw.choice(sorted(at))
            if not isinstance(at[key], dict) or not at[key] or draw.random() < 0.2:
                break
            at = at[key]
        at[key] = draw.choice([None, [], {}, "9.0", 9.0, -1, True, [1, 2]])
        path.write_text(json.dumps(values))
    except (OSError, ValueError, TypeError, AttributeError, UnboundLocalError):
        pass  # damaged already


def folder_instead(path, draw):
    path.unlink()
    path.mkdir()


def dangling(path, draw):
    path.unlink()
    path.symlink_to("nowhere")


SHORT = {
    "cut off": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    "growth": lambda path, draw: path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 50))),
    "removal": lambda path, draw: path.unlink(),
    "removal of all": lambda path, draw: shutil.rmtree(path.parent),
    "renaming": lambda path, draw: path.parent.rename(f"{path.parent.parent}/checkpoint-{draw.randrange(100):08d}x"),
}
DAMAGE = SHORT | {kind.__name__: kind for kind in (flip, swap, odd, odd_value, folder_instead, dangling)}


def damage(root, draw: random.Random):
    """Damages a set of checkpoints, mostly the newest alone; returns in words what was done."""
    done, folders = [], sorted(root.glob("checkpoint-*"), reverse=True)
    if draw.random() < 0.1:
        pointers = [b"", b"\xff\xfe\x00", b"../..", b"checkpoint-99999999", draw.randbytes(40), b"x" * 5000]
        (root / "LATEST").write_bytes(draw.choice(pointers))
        done.append("pointer")
    harmed = folders[:1] if draw.random() < 0.7 else draw.sample(folders, draw.randint(1, len(folders)))
    for folder in harmed:
        path, kind = folder / draw.choice(FILES), draw.choice([*DAMAGE, "flip", "flip"])
        if path.is_file():
            DAMAGE[kind](path, draw)
            done.append(f"{kind} of {path.name}")
    return done


@dataclass
class Damaged:
    """How many cases ended how; problems: one sentence for each that ended otherwise than promised."""

    outcomes: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        parts = ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common())
        total = sum(self.outcomes.values()) + len(self.problems)
        broken = "".join(f"\n* {problem}" for problem in self.problems)
        return f"{total} sets of checkpoints with random damage: {parts}; {len(self.problems)} otherwise.{broken}"


def damaged_checkpoints(root, count, draw: random.Random) -> Damaged:
    """Damages copies of root in `count` ways and asks for the point to resume from."""
    originals = {folder.name: load(folder) for folder in root.glob("checkpoint-*")}
    found = Damaged()
    for index in range(count):
        copy = root.with_name(f"damaged{index}")
        shutil.copytree(root, copy)
        kinds = damage(copy, draw)
        try:
            found.outcomes[_outcome(copy, originals)] += 1
        except Exception as error:
            found.problems.append(f"case {index} ({', '.join(kinds)}): {type(error).__name__}: {error}")
        shutil.rmtree(copy)
    return found


def _outcome(root, originals):
    """What became of a damaged set of checkpoints. Raises AssertionError where that is not what is promised."""
    said = []
    whole = [folder for folder in root.glob("checkpoint-*") if folder.name in originals and _equal(folder, originals)]
    try:
        path = resume_point(root, said.append)
    except InputError as error:
        assert not whole, f"refused though {whole[0].name} is intact"
        assert str(error).count("\n") == 0 and len(str(error)) < 500, "no one sentence"
        return "refused in one sentence"
    assert path is not None, "a silent restart"
    read, original = load(path), originals[path.name]
    assert (read.step, read.meta) == (original.step, original.meta)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in original.tensors.items())
    newest = max(originals)
    if path.name == newest:
        return "of the newest still whole"
    there = [folder.name for folder in root.glob("checkpoint-*") if folder.name > path.name]
    assert all(any(name in line for line in said) for name in there), f"{there} not named in {said}"
    assert said, "the newest was passed over in silence"
    return "taken from the one before, and named"


def _equal(folder, originals):
    try:
        return load(folder).meta == originals[folder.name].meta
    except InputError:
        return False
