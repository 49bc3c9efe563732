"""`python -m benchmarks.gguf_decode` and `gguf_model`: files of the widths that they say, rows, and turns."""

import json
import sys

import pytest
import yaml
from test_gguf import tiny
from tiny_tokenizers import TEXTS, byte_level

from atp.models.stock import save_model
from benchmarks import gguf_decode, gguf_model
from benchmarks.gguf_decode import GONE, KEEP, SHAPES, Shape, cases
from benchmarks.gguf_forward import File
from benchmarks.records import read

TINY = Shape(hidden=64, layers=4, kv_heads=3, group=2, inner=512, head_dim=32)


def matrices(file):
    """Parameters of the decoder's matrices."""
    return sum(held.numel() for name, held in file.tensors.items() if name.startswith("blk.") and held.dim() == 2)


def test_cuts_keep_their_share_in_the_architecture_that_they_are_for(tmp_path):
    found = {}
    for number, (name, layers) in enumerate(cases(TINY).items()):
        gguf_decode.write_case(TINY, layers, "f32", byte_level(), tmp_path / f"{number}.gguf")
        found[name] = File(tmp_path / f"{number}.gguf")
    whole = matrices(found["whole"])
    assert whole == TINY.layers * TINY.layer(TINY.kv_heads, TINY.inner)
    step = TINY.layers * 3 * TINY.hidden * gguf_decode.MULTIPLE / whole
    for name in ("mlp", "mlp, unequal", "heads and mlp"):
        assert abs(matrices(found[name]) / whole - KEEP) <= step / 2, name
    assert found["heads and mlp"].key("attention.head_count_kv") == 2
    assert {name: file.architecture for name, file in found.items() if file.architecture != "llama"} == {
        "mlp, unequal": "deci"
    }
    assert matrices(found["whole layers"]) == 2 * TINY.layer(TINY.kv_heads, TINY.inner), "of four layers, 60 % of them"
    assert matrices(found["a fifth, heads and mlp"]) < 0.3 * whole
    assert matrices(found["a fifth, whole layers"]) == TINY.layer(TINY.kv_heads, TINY.inner)
    assert [layer != GONE for layer in cases(SHAPES["smollm2"])["a fifth, whole layers"]] == ([False] * 4 + [True]) * 6
    assert matrices(found["thin layers"]) == TINY.layers * matrices(found["one thin layer"])


class Clock:
    """Stands for llama.cpp: file n takes 8 / (n + 1) ms by its clock and 4 / (n + 1) of processor time."""

    def __init__(self, path, context, *, exact, threads):
        self.number, self.calls = int(path.stem), 0
        assert path.is_file() and not exact and threads == 2 and context >= gguf_decode.PROMPT + 3

    def decode_seconds(self, ids, new):
        assert (len(ids), new) == (gguf_decode.PROMPT, 3)
        self.calls += 1
        return (0.008 / (self.number + 1), 0.004 / (self.number + 1)) if self.calls > 1 else (1e9, 1e9)


def test_rows_compare_with_the_first_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_decode, "require_llama_cpp", lambda: None)
    monkeypatch.setattr(gguf_decode, "LlamaCpp", Clock)
    monkeypatch.setattr(gguf_decode, "load_tokenizer", lambda place: byte_level())
    monkeypatch.setitem(gguf_decode.SHAPES, "tiny", TINY)
    sizes = ["--threads", "2", "--rounds", "2", "--new", "3", "--dtype", "f16"]
    assert gguf_decode.main(["tiny", *sizes, "--out", str(tmp_path / "rows.csv")]) == 0
    whole, *others = read(tmp_path / "rows.csv")
    assert [whole[key] for key in ("model", "clock_ms", "cpu_ms", "mb_ratio")] == ["tiny: whole", "8.0", "4.0", "1.0"]
    assert [(row["clock_ratio"], row["cpu_ratio"]) for row in others[:2]] == [("2.0", "2.0"), ("3.0", "3.0")]
    matrices = (TINY.layers * TINY.layer(TINY.kv_heads, TINY.inner) + len(byte_level()) * TINY.hidden) * 2
    norms = (2 * TINY.layers + 1) * TINY.hidden * 4
    assert float(whole["mb"]) == pytest.approx((matrices + norms) / 1e6, abs=0.05)
    assert float(others[-1]["mb_ratio"]) > float(others[0]["mb_ratio"]) > 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(config file, folder of a cut model)."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = byte_level()
    save_model(tiny("llama", "unequal", vocab_size=len(tokenizer)), folder / "cut")
    tokenizer.save_pretrained(folder / "cut")
    texts = {"train": TEXTS, "test": [" ".join(reversed(text.split())) for text in TEXTS]}
    for part, found in texts.items():
        rows = "\n".join(json.dumps({"text": text}) for text in found)
        (folder / f"{part}.jsonl").write_text(rows, encoding="utf-8")
    data = {part: str(folder / f"{part}.jsonl") for part in texts} | {"length": 16, "general_share": 0}
    values = {"model": {"path": str(folder / "cut")}, "output_dir": "unused", "data": data}
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "config.yaml", folder / "cut"


def test_each_form_is_scored_from_its_file(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gguf_model, "find_spec", lambda name: None)
    config, model = map(str, folders)
    assert gguf_model.main(["--out", str(tmp_path / "rows.csv"), "quality", config, model, "--windows", "3"]) == 0
    assert "/" not in read(tmp_path / "rows.csv")[0]["model"], "a row tells no folder of one machine"
    rows = read(tmp_path / "rows.csv")
    assert [row["form"] for row in rows] == ["transformers", "f32", "f16", "q8_0"]
    assert {row["architecture"] for row in rows[1:]} == {"deci"} and len({row["tokens"] for row in rows}) == 1
    reference, *found = (float(row["perplexity"]) for row in rows)
    assert found[0] == pytest.approx(reference, rel=1e-5)
    off = [abs(value / reference - 1) for value in found]
    assert off[0] < off[1] < off[2] < 0.1, "the fewer bits, the further away"
    sizes = [float(row["mb"]) for row in rows[1:]]
    assert sizes == sorted(sizes, reverse=True)
    assert "form q8_0" in capsys.readouterr().out


@pytest.mark.parametrize("main", [gguf_decode.main, gguf_model.main], ids=["decode", "model"])
def test_a_missing_llama_cpp_is_one_sentence(folders, tmp_path, monkeypatch, capsys, main):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    asked = ["smollm2"] if main is gguf_decode.main else ["speed", *[str(folders[1])] * 2]
    assert main(["--out", str(tmp_path / "rows.csv"), *asked]) == 2
    assert capsys.readouterr().err.startswith("error: llama.cpp is not installed (")
    assert not (tmp_path / "rows.csv").exists()
