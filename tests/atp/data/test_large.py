"""Data in tables are those in lists: splits, samples, hashes and refusals."""

import gc
import json
import os
import random
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from test_packing import byte_tokenizer

from atp.data import DataSettings, arrow, assemble, examples, fitted, load_recipe, pack, unpacked
from atp.data.examples import Stored, chosen, joined, settled, values
from atp.ground.errors import InputError
from atp.training.resume import of_samples

WORDS = [f"w{n}" for n in range(300)]
TOKENIZER = byte_tokenizer(bos=True)
WAYS = {
    "joined": lambda part: pack(part, TOKENIZER, 32, loss_on="completion"),
    "separate": lambda part: pack(part, TOKENIZER, 32, separate=True),
    "padded": lambda part: unpacked(part, TOKENIZER, 24, loss_on="completion"),
    "fitted": lambda part: fitted(part, TOKENIZER, 50, loss_on="completion"),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Rows of which some are near-duplicates, some bad, some plain text, and not all ASCII."""
    rng = random.Random(0)
    base = [rng.choices(WORDS, k=40) for _ in range(200)]
    path = tmp_path_factory.mktemp("large") / "a.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for n, words in enumerate(base * 2):
            text = " ".join([*words[: 30 if n % 200 >= 170 else 10], *rng.choices(WORDS, k=20), "日本 é"])
            out.write(json.dumps({"prompt": text, "completion": " yes é" if n % 3 else ""}, ensure_ascii=False) + "\n")
        out.write('{"prompt": 3}\n')
    return path


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Everything over 10,000 characters goes to tables, and stays there, in small files."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arrow, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(arrow, "_FILE_BYTES", 30_000)
    monkeypatch.setattr(arrow, "_ROWS_AT_ONCE", 50)
    monkeypatch.setattr(arrow, "_READS", 70)
    monkeypatch.setattr(examples, "LARGE", 10_000)
    monkeypatch.setattr(assemble, "settled", lambda part: part)
    return tmp_path / "cache"


def folders(cache):
    """The tables in a cache, without their locks."""
    return [path for path in cache.iterdir() if path.is_dir()]


def load(file, **changes):
    options = {"recipe": "custom", "train": str(file), "validation_share": 0.1, "on_error": "skip"}
    return load_recipe(DataSettings(**options | changes))


@pytest.fixture(scope="module")
def listed(file):
    splits = load(file)
    return splits, {way: of_samples(make(splits.train)) for way, make in WAYS.items()}


def test_tables_give_what_lists_give(file, large, listed, monkeypatch):
    splits, hashes = listed
    with monkeypatch.context() as patch:
        patch.setattr(arrow, "find", lambda name: None)
        assert not isinstance(load(file).train, Stored), "without datasets all stays in lists"
    with pytest.raises(InputError, match="a.jsonl, line 401: column 'prompt' holds 3, not text"):
        load(file, on_error="stop")
    assert folders(large) == [], "a bad row leaves nothing"
    for turn in range(2):
        if turn:  # the second reads what the first has made
            written = {path: path.stat().st_mtime_ns for path in large.rglob("*.arrow")}
            monkeypatch.setattr(arrow, "write", None)
        stored = load(file)
        assert isinstance(stored.train, Stored) and not isinstance(splits.train, Stored)
        assert stored.fingerprints == splits.fingerprints and stored.description == splits.description
        assert stored.skipped == splits.skipped and len(stored.skipped) == 1
        assert "near-duplicates of held-out documents dropped" in stored.description
        for way, make in WAYS.items():
            samples = make(stored.train)
            assert of_samples(samples) == hashes[way], (turn, way)
        last = samples[len(samples) - 1]
        assert last["input_ids"].equal(list(samples)[-1]["input_ids"]) and samples.lengths[-1] == len(last["labels"])
    assert written == {path: path.stat().st_mtime_ns for path in large.rglob("*.arrow")}
    (folder,) = folders(large)
    assert len(arrow.parts_in(folder)) > 1, "of several files"
    assert list(stored.test) == list(splits.test) and stored.test[3:5][0] == splits.test[3]


def test_a_whole_pass_leaves_nothing_mapped(file, large):
    """Pages that were read count as resident memory, though nobody needs them any more."""

    def mapped():
        return str(large) in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")

    train = load(file).train
    assert not mapped(), "near-duplicates"
    first = next(iter(train))
    assert mapped() and list(train)[0] == first and not mapped(), "texts"
    windows = pack(train, TOKENIZER, 32)
    assert not mapped(), "windows without a loss"
    one = windows[0]["input_ids"]
    assert mapped() and one.equal(next(iter(windows))["input_ids"])
    of_samples(windows)
    assert not mapped(), "a pass over all windows"


def test_another_content_or_meaning_is_another_table(file, large, tmp_path):
    before = load(file)
    changed = tmp_path / "a.jsonl"
    changed.write_text(file.read_text(encoding="utf-8").replace("yes", "no", 1), encoding="utf-8")
    assert load(changed).fingerprints != before.fingerprints
    mapped = load(file, columns={"prompt": "prompt", "completion": "completion"})
    assert mapped.fingerprints == before.fingerprints and len(folders(large)) == 3


def test_weights_count_stored_examples(file, large, tmp_path):
    small = tmp_path / "small.jsonl"
    rows = ({"text": " ".join(random.Random(n).choices(WORDS, k=20))} for n in range(60))
    small.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    splits = load(None, train={str(file): 2, str(small): 1})
    counts = Counter(values(splits.train, "origin"))
    assert counts[str(file)] == 2 * counts[str(small)] > 0
    assert {e.origin for e in splits.train} == counts.keys()


def test_damage_and_a_full_disk_are_one_sentence(file, large, monkeypatch):
    load(file)
    (part, *_) = sorted(large.rglob("part-*.arrow"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match="part-000000.arrow is damaged .*: delete the folder"):
        load(file)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.ipc.new_stream", full)
    with pytest.raises(InputError, match="cannot write the table .*No space left .*HF_DATASETS_CACHE"):
        load(file, limit=390)


def test_tables_in_use_stay_when_others_leave(file, large, monkeypatch):
    monkeypatch.setenv("ATP_DATA_CACHE_GB", "0")
    first = load(file)
    texts = list(first.train)
    windows = pack(load(file, limit=390).train, TOKENIZER, 32)
    assert len(folders(large)) == 2 and list(first.train) == texts
    hashed = of_samples(windows)
    del first
    gc.collect()
    load(file, limit=380)
    assert len(folders(large)) == 2 and of_samples(windows) == hashed, "its tokens count as used, too"
    assert list(load(file).train) == texts, "and what has left is made again"


def test_processes_share_a_cache_that_holds_nothing_unused(file, large, monkeypatch):
    monkeypatch.setenv("ATP_DATA_CACHE_GB", "0")
    limits = (380, 390)
    expected = {limit: load(file, limit=limit).fingerprints for limit in limits}
    children = []
    for turn in range(2):
        if (child := os.fork()) == 0:
            code = 1
            with suppress(BaseException):
                for limit in (limits * 2)[turn:]:
                    found = load(file, limit=limit)
                    assert found.fingerprints == expected[limit] and len(list(found.train)) == len(found.train)
                code = 0
            os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_parts_of_different_kinds_are_joined_and_settle(file, large):
    stored = load(file).train
    both = joined(list(stored[:3]), stored, stored[1:2])
    assert list(both) == [*list(stored[:3]), *stored, stored[1]] and len(both) == len(stored) + 4
    assert values(both, "document") == [example.document for example in both]
    assert list(chosen(both, [5, 0])) == [both[5], both[0]]
    assert isinstance(settled(stored[:20]), list) and settled(stored) is stored


def test_small_data_do_not_import_datasets(file):
    """Its import takes half a second."""
    code = (
        "import sys; from atp.data import DataSettings, load_recipe, pack; from test_packing import byte_tokenizer\n"
        f"splits = load_recipe(DataSettings(recipe='custom', train={str(file)!r}, on_error='skip'))\n"
        "pack(splits.train, byte_tokenizer(), 32); print('datasets' in sys.modules, 'pyarrow' in sys.modules)"
    )
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.stdout.split() == [b"False", b"False"], done.stderr
