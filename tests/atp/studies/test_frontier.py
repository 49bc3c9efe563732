"""`atp frontier`: files of a tiny run and of a rival with another tokenizer, their rows, and what these say."""

import csv
import json
import random
import sys

import pytest
import torch
from tiny_command import start
from tiny_tokenizers import TEXTS, byte_level
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from atp.config import ATPConfig
from atp.evaluation import packed_windows
from atp.evaluation.perplexity import ScoredWindows, bytes_of, windows_of
from atp.ground.errors import InputError
from atp.inputs.loading import load_data, load_tokenizer
from atp.studies import frontier as module
from atp.studies.frontier import BITS, Model, frontier
from atp.studies.frontier_table import answers, at_size, table
from benchmarks.gguf_forward import File, logits

SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 96, "eos_token_id": 2, "initializer_range": 0.1,
}  # fmt: skip
COLUMNS = [
    "model", "kind", "bits", "megabytes", "prefill_tokens_per_second", "decode_tokens_per_second", "threads",
    *(f"{name}{end}" for name in ("bits_per_byte", "qa macro_f1") for end in ("", " low", " high")),
    "file", "sha256", "source", "scored_on",
]  # fmt: skip


def llama(folder, tokenizer, seed):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(finished run with a tuned dense model, folder of a rival with fewer words)."""
    folder = tmp_path_factory.mktemp("frontier")
    ours = llama(folder / "ours", byte_level(vocab_size=340), 0)
    rival = llama(folder / "rival", byte_level(vocab_size=290), 1)
    draw, words = random.Random(0), " ".join(TEXTS).split()
    rows = [{"prompt": " ".join(draw.choices(words, k=12)), "completion": (" yes", " no")[i % 2]} for i in range(60)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = ATPConfig.parse({
        "model": {"path": str(ours)}, "output_dir": "unused",
        "data": {"train": str(folder / "data.jsonl"), "labels": ["yes", "no"], "length": 64, "general_share": 0,
                 "loss_on": "all"},
        "decisions": {"saliency_windows": 2, "refit_windows": 2, "target_keep": 0.6, "multiples": {"mlp": 32}},
        "training": {"open": 2, "tune": 4, "warmup": 1, "lr": 5e-3, "precision": "float32",
                     "embeddings": True},
        "vocabulary": {"keep": 320},
        "evaluation": {"windows": 60, "questions": 4, "samples": 0, "dense_baseline": True},
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atp.inputs.promises.BUDGET_TOLERANCE", 0.2)
        patch.setattr("atp.inputs.checks.BUDGET_TOLERANCE", 0.2)
        start(config, folder / "run")
    return folder / "run", rival


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """(output folder, rows, sentences) without llama.cpp."""
    out = tmp_path_factory.mktemp("out") / "frontier"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find", lambda name: None)
        return out, *frontier([str(source) for source in inputs], out, say=lambda line: None)


def read(out):
    with (out / "frontier.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_per_file_and_a_file_per_size(finished):
    out, rows, _ = finished
    names = [("original", "original"), ("tuned dense", "dense"), ("run", "cut"), ("rival", "rival")]
    assert [(row["model"], row["kind"], row["bits"]) for row in rows] == [(*n, b) for n in names for b in BITS]
    found = read(out)
    assert list(found[0]) == COLUMNS and len(found) == len(rows)
    for row in rows:
        assert row["megabytes"] == (out / row["file"]).stat().st_size / 1e6
    sizes = [row["megabytes"] for row in rows]
    assert all(sizes[n] > sizes[n + 1] > sizes[n + 2] for n in range(0, 12, 3))
    assert sizes[6] < sizes[3] < sizes[0], "the tuned dense model has fewer words, the cut one fewer channels too"
    assert {row["decode_tokens_per_second"] for row in found} == {""}
    assert (out / "frontier.md").read_text(encoding="utf-8").count("\n| ") == 2 + len(rows)
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [6, 8, 9, 11])
def test_a_file_is_scored_as_it_is_in_windows_of_its_own_tokenizer(finished, inputs, number):
    """The reference computes from the file alone, by llama.cpp's rules, and shares no weights with ours."""
    out, rows, _ = finished
    run, rival = inputs
    config = ATPConfig.load(run / "resolved.yaml", ["vocabulary.keep=null"])
    ours = load_tokenizer(config.model)
    text = bytes_of(packed_windows(load_data(config, ours).test, ours), 60)
    config.model.path = str(rival if number >= 9 else run / "model")
    tokenizer = load_tokenizer(config.model)
    windows = packed_windows(load_data(config, tokenizer).test, tokenizer)
    count = windows_of(windows, text, 0)
    assert count >= 3
    expected = bits_per_byte(File(out / rows[number]["file"], torch.float32), windows, count)
    assert rows[number]["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def bits_per_byte(file, windows: ScoredWindows, count):
    nats = size = 0.0
    for ids, labels, held in zip(windows.input_ids[:count], windows.labels, windows.bytes, strict=False):
        chances = logits(file, ids[None])[0, :-1].double().log_softmax(-1)
        scored = labels[1:] >= 0
        nats -= float(chances[scored, labels[1:][scored]].sum())
        size += float(held[1:][scored].sum())
    return nats / torch.tensor(2.0).log().item() / size


def test_the_tuned_dense_model_is_the_one_that_the_run_scored(finished, inputs):
    """At 16 bits its figures are the run's own but for float16's rounding; so are those of the others."""
    _, rows, _ = finished
    run, rival = inputs
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for number, name in ((0, "original"), (3, "tuned_dense"), (6, "final")):
        assert rows[number]["bits_per_byte"] == pytest.approx(summary["bits_per_byte"][name], rel=2e-3)
        assert rows[number]["qa macro_f1"] == pytest.approx(summary["qa"][name]["macro_f1"])
    assert abs(summary["bits_per_byte"]["original"] / summary["bits_per_byte"]["tuned_dense"] - 1) > 0.01
    assert AutoModelForCausalLM.from_pretrained(rival).config.vocab_size == 290


def test_what_is_there_is_not_measured_again(finished, inputs, monkeypatch):
    out, rows, _ = finished
    sources = [str(source) for source in inputs]
    monkeypatch.setattr(module, "find", lambda name: None)
    loaded = []
    load = Model.load
    monkeypatch.setattr(Model, "load", lambda self: (loaded.append(self.name), load(self))[1])
    again, _ = frontier(sources, out, say=lambda line: None)
    assert again == rows and loaded == []
    lost = out / rows[7]["file"]
    content = lost.read_bytes()
    lost.write_bytes(content[:-1])
    monkeypatch.setattr(module.Scores, "of", lambda *_: pytest.fail("a file with the same content was scored"))
    again, _ = frontier(sources, out, say=lambda line: None)
    assert again == rows and loaded == ["run"] and lost.read_bytes() == content


def test_llama_cpp_times_only_what_it_has_not_timed(finished, inputs, monkeypatch):
    out, rows, _ = finished
    sources, timed = [str(source) for source in inputs], []

    def rates(paths, threads):
        timed.append((len(paths), threads))
        return [(100.0 + n, 10.0 + n) for n in range(len(paths))]

    monkeypatch.setattr(module, "find", lambda name: True)
    monkeypatch.setattr(module, "rates", rates)
    for threads in (1, 1, 2):
        found, said = frontier(sources, out, threads=threads, say=lambda line: None)
    assert timed == [(12, 1), (12, 2)] and not any("not installed" in line for line in said)
    assert [row["decode_tokens_per_second"] for row in found] == [10.0 + n for n in range(12)]
    assert [row["bits_per_byte"] for row in found] == [row["bits_per_byte"] for row in rows]


def row(model, kind, megabytes, score):
    figures = {"bits_per_byte": score, "bits_per_byte low": score, "bits_per_byte high": score}
    return {"model": model, "kind": kind, "bits": 8, "megabytes": megabytes, **figures}


def test_sentences_by_hand():
    dense = [row("dense", "dense", 200.0, 0.8), row("dense", "dense", 100.0, 0.9)]
    cut = [row("cut", "cut", 125.0, 0.81), row("cut", "cut", 70.0, 0.95)]
    rows = [*dense, *cut, row("original", "original", 200.0, 2.0), row("big", "rival", 300.0, 0.7)]
    assert at_size(dense, 125.0, "bits_per_byte") == (pytest.approx(0.875), None)
    assert at_size(dense, 70.0, "bits_per_byte") == (0.9, 100.0)
    assert at_size(dense, 100.0, "bits_per_byte") == (0.9, None) and at_size(dense, 1.0, "qa") is None
    said = list(answers(rows))
    assert said[0] == (
        "cut against dense at equal MB: 70.0 MB in 8 bits: bits per byte 0.950 against 0.900 (at 100.0 MB); "
        "125.0 MB in 8 bits: bits per byte 0.810 against 0.875."
    )
    assert said[1].startswith("cut against big at equal MB: 70.0 MB in 8 bits: bits per byte 0.950 against 0.700 (at 3")
    assert said[2].startswith("Equal MB: ") and "not installed" in said[3] and len(said) == 4
    untuned = [r for r in rows if r["kind"] != "dense"]
    assert next(answers(untuned)).startswith("cut against original at equal MB")
    assert table(rows)[1][0][:6] == ["dense", "8", "200.0", "–", "–", "0.800 (0.800 to 0.800)"]


def test_wrong_sources_are_one_sentence_and_write_nothing(inputs, tmp_path, refused, monkeypatch):
    run, rival = inputs
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    out = tmp_path / "out"
    assert "give the folder of a finished run" in refused("frontier", rival, "--out", out)
    assert "no such file or folder" in refused("frontier", run, tmp_path / "none", "--out", out)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text((run / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert "begun is not finished: continue it with --resume" in refused("frontier", begun, "--out", out)
    assert "holds something else" in refused("frontier", run, "--out", rival)
    assert not out.exists()


def test_runs_of_other_test_data_are_refused(inputs, tmp_path):
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    for name in ("config.yaml", "resolved.yaml", "summary.json", "model/config.json"):
        (other / name).write_bytes((inputs[0] / name).read_bytes())
    summary = json.loads((other / "summary.json").read_text(encoding="utf-8"))
    summary["data"]["test"] = "another"
    (other / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(InputError, match="have different test data"):
        frontier([str(inputs[0]), str(other)], tmp_path / "out")
