"""`python -m benchmarks.gguf_decode`: files of the widths that it says, and rows that compare with the first."""

import sys

import pytest
from tiny_tokenizers import byte_level

from benchmarks import gguf_decode
from benchmarks.gguf_decode import KEEP, Shape, cases
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


def test_a_missing_llama_cpp_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert gguf_decode.main(["smollm2", "--out", str(tmp_path / "rows.csv")]) == 2
    assert capsys.readouterr().err.startswith("error: llama.cpp is not installed (")
    assert not (tmp_path / "rows.csv").exists()
