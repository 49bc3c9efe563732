"""`python -m benchmarks.gguf_model`: rows of a tiny cut model, and the turns that two models take."""

import json
import sys

import pytest
import yaml
from test_gguf import tiny
from tiny_tokenizers import TEXTS, byte_level

from atp.models.stock import save_model
from benchmarks import gguf_model
from benchmarks.records import read


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


class Clock:
    """Stands for llama.cpp: the first model takes 100 and 10 tokens a second, the second twice that, warm-up none."""

    asked = []

    def __init__(self, path, context, *, exact, threads):
        self.number, self.calls = int(path.stem), 0
        assert path.is_file() and not exact and threads == 3 and context >= 16 + 4

    def speed(self, ids, new):
        assert (len(ids), new) == (16, 4)
        self.asked.append(self.number)
        self.calls += 1
        return (100.0 * (self.number + 1), 10.0 * (self.number + 1)) if self.calls > 1 else (1e-9, 1e-9)


def test_models_take_turns(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model, "require_llama_cpp", lambda: None)
    monkeypatch.setattr(gguf_model, "LlamaCpp", Clock)
    model, sizes = str(folders[1]), ["--threads", "3", "--rounds", "2", "--prompt", "16", "--new", "4"]
    assert gguf_model.main(["--out", str(tmp_path / "rows.csv"), "speed", model, model, *sizes]) == 0
    assert Clock.asked == [1, 0, 0, 1, 1, 0]
    first, second = read(tmp_path / "rows.csv")
    assert (first["prefill"], first["decode"], first["decode_ratio"]) == ("100.0", "10.0", "1.0")
    assert (second["prefill"], second["prefill_ratio"], second["decode_ratio"]) == ("200.0", "2.0", "2.0")


def test_a_missing_llama_cpp_is_one_sentence(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert gguf_model.main(["--out", str(tmp_path / "rows.csv"), "speed", *[str(folders[1])] * 2]) == 2
    assert capsys.readouterr().err.startswith("error: llama.cpp is not installed (")
    assert not (tmp_path / "rows.csv").exists()
