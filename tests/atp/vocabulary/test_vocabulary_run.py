"""Whole runs that keep a part of the vocabulary: what is scored, trained, saved, resumed and loaded elsewhere."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from launched_runs import assert_equal, ended, write_settings
from launched_runs import start as launched
from safetensors.torch import load_file, save_file
from tiny_command import read, results, start, stopping_at
from tiny_inputs import changed
from tiny_texts import KINDS, PADDING, tiny_texts
from transformers import AutoModelForCausalLM

from atp.cli.chat import Conversation
from atp.data.encoding import encode
from atp.data.packing import IGNORE
from atp.evaluation import packed_windows, perplexity, throughput
from atp.evaluation.perplexity import bytes_of
from atp.export import quantized
from atp.export.command import export
from atp.ground.errors import InputError
from atp.inputs.loading import held_out, load_data, load_model, load_shapes, load_tokenizer
from atp.inputs.targets import WORTH, in_shares, share_of, worth_of_words
from atp.models.load import read_config, read_model, read_tokenizer
from atp.plan.plan import make_plan
from atp.processes import processes
from atp.run import Run
from atp.studies.compare.baseline_run import BaselineRun
from atp.studies.engines import Here
from atp.studies.sweep import Sweep
from atp.studies.sweep.units import UNITS
from atp.training.trainer import ATPTrainer


@pytest.fixture(scope="module", params=KINDS)
def done(request, tmp_path_factory):
    """(config, folder, summary, lines said) of a finished run."""
    config = tiny_texts(tmp_path_factory.mktemp("texts"), request.param)
    folder, said = tmp_path_factory.mktemp("trimmed") / "run", []
    return config, folder, start(config, folder, say=said.append), said


def test_the_run_says_and_records_what_its_words_come_to(done):
    config, folder, summary, said = done
    kept = load_file(folder / "vocabulary.safetensors")["kept"]
    whole, small = load_tokenizer(config.model), read_tokenizer(folder / "model")
    shapes = load_shapes(config.model)
    found = summary["vocabulary"]
    assert found["words"] == {"before": len(whole) + PADDING, "after": len(kept)} and len(small) == len(kept)
    assert found["parameters"] == {"before": 32 * (len(whole) + PADDING), "after": 32 * len(kept)}
    assert found["megabytes"]["after"] == 4 * 32 * len(kept) / 1e6
    parts = summary["parts"]
    assert (parts["original"]["total"], parts["final"]["total"]) == (summary["params_before"], summary["params_after"])
    assert parts["final"]["embedding"] == found["parameters"]["after"] and parts["final"]["head"] == 0
    assert "in embedding and head" in (folder / "report.html").read_text()
    texts = [example.text for example in load_data(config, whole).splits.test]
    for when, tokenizer in (("before", whole), ("after", small)):
        assert found["tokens_per_text"][when] == sum(map(len, encode(tokenizer, texts))) / len(texts)
    decoder = summary["params_after"] - found["parameters"]["after"] - shapes.hidden_size
    before = summary["params_before"] - found["parameters"]["before"] - shapes.hidden_size
    assert summary["keep_decoder"] == decoder / before, "the share is of the decoder alone"
    assert any(line.startswith(f"vocabulary: {len(kept):,} of {len(whole) + PADDING:,} words stay") for line in said)
    for name in ("model/README.md", "report.html"):
        assert f"{len(kept):,} of {len(whole) + PADDING:,} words" in (folder / name).read_text(), name
    for name in ("base/README.md", "adapter/README.md", "model/README.md"):
        assert "words" in (folder / name).read_text(), name


def test_untuned_logits_of_kept_words_are_certified(done):
    config, folder, summary, _ = done
    certificate = read(folder, "certificate.json")
    assert certificate["vocabulary_gap"] == summary["certificate"]["vocabulary_gap"] == 0.0
    assert certificate["limits"]["vocabulary_gap"] == 0.0
    assert "largest difference of their logits" in (folder / "report.html").read_text()


def test_the_original_is_scored_whole_and_by_its_own_tokens(done):
    config, folder, summary, _ = done
    whole = load_tokenizer(config.model)
    model = load_model(config.model, config.decisions.space)
    splits = load_data(changed(config, "vocabulary.keep=null"), whole).splits
    windows = packed_windows(held_out(config, splits, whole), whole)
    expected = perplexity(model, windows, max_windows=config.evaluation.windows)
    scored = read(folder, "evaluation.json")["original"]
    assert scored["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert scored["tokens"] == expected["tokens"]
    assert "bits per byte" in (folder / "report.html").read_text()

    # The cut model is scored on the windows of its own tokens that hold this text, and on no window beyond it.
    small = read_tokenizer(folder / "model")
    own = packed_windows(held_out(config, splits, small), small)
    text, taken = bytes_of(windows, config.evaluation.windows), read(folder, "evaluation.json")["final"]["tokens"]
    ends = (own.labels[:, 1:] != IGNORE).sum(1).cumsum(0).tolist()
    count = ends.index(taken) + 1
    assert bytes_of(own, count - 1) < text <= bytes_of(own, count)


def test_the_folder_is_loaded_without_this_package_and_gives_the_same(done, tmp_path):
    """In another process, which knows nothing of ours: model, tokenizer, generation, base with adapter."""
    _, folder, _, _ = done
    code = """if True:
        import json, sys, torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer
        run, out = sys.argv[1:]
        model = AutoModelForCausalLM.from_pretrained(run + "/model").eval()
        tokenizer = AutoTokenizer.from_pretrained(run + "/model")
        base = AutoModelForCausalLM.from_pretrained(run + "/base")
        adapted = PeftModel.from_pretrained(base, run + "/adapter").eval()
        ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
        with torch.no_grad():
            logits, theirs = model(ids).logits, adapted(ids).logits
        torch.testing.assert_close(theirs, logits, rtol=1e-3, atol=1e-4)
        said = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert said.max() < len(tokenizer) == model.config.vocab_size
        assert not any(name.split(".")[0] == "atp" for name in sys.modules)
        torch.save({"ids": ids, "logits": logits}, out)
        print(json.dumps([model.generation_config.eos_token_id, tokenizer.eos_token_id, type(model).__name__]))
    """
    environment = os.environ | {"PYTHONPATH": ""}
    made = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "x.pt")], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert made.returncode == 0, made.stderr
    ends, eos, name = json.loads(made.stdout)
    tokenizer = read_tokenizer(folder / "model")
    assert ends == [tokenizer.eos_token_id, tokenizer.unk_token_id] and eos == tokenizer.eos_token_id
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["ids"].tolist() == tokenizer("The quick brown fox", return_tensors="pt").input_ids.tolist()
    ours = read_model(folder / "model", dtype="auto").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(found["ids"]).logits, found["logits"])


def test_gguf_holds_the_kept_words_and_reads_back(done, tmp_path):
    _, folder, _, _ = done
    path, _ = export(str(folder), "gguf", "f32", tmp_path / "trimmed.gguf")
    small, found = read_tokenizer(folder / "model"), read_tokenizer(tmp_path, path.name)
    assert found.get_vocab() == small.get_vocab()
    texts = ["The quick brown fox doesn't sleep.", "Größe, 東京 🚀 and WE'RE NOT", *KINDS]
    assert encode(found, texts) == encode(small, texts)
    model, back = read_model(folder / "model", torch.float32), read_model(tmp_path, torch.float32, path.name)
    ids = torch.tensor(encode(small, texts[:1]))
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_it_is_scored_and_answers_like_any_folder(done, atp, tmp_path):
    config, folder, summary, _ = done
    out = tmp_path / "scores.json"
    code, _, err = atp("eval", folder, "--suite", folder / "config.yaml", "--output", out)
    assert code == 0, err
    assert json.loads(out.read_text())["bits_per_byte"] == pytest.approx(summary["bits_per_byte"]["final"], rel=1e-3)
    said = []
    answer = Conversation(str(folder)).ask("The quick brown fox", said.append, tokens=4)
    assert "".join(said) == answer.text and 0 < answer.tokens <= 4


def test_it_is_planned_for(done):
    config, _, summary, _ = done
    plan = make_plan(config)
    assert plan["vocabulary"] == {k: v for k, v in summary["vocabulary"].items() if k != "largest_logit_change"}
    assert plan["parameters"]["after"]["embedding"]["parameters"] == summary["vocabulary"]["parameters"]["after"]
    assert plan["parameters"]["before"]["embedding"]["parameters"] == summary["vocabulary"]["parameters"]["before"]
    assert any(line.startswith("Vocabulary: ") for line in plan["remarks"])
    plain = make_plan(changed(config, "vocabulary.keep=null"))
    saved = summary["vocabulary"]["megabytes"]["before"] - summary["vocabulary"]["megabytes"]["after"]
    weights = [{row["phase"]: row["parts"].get("weights") for row in each["memory"]} for each in (plain, plan)]
    assert weights[0]["score"] == weights[1]["score"], "the original has all words"
    for phase in ("open", "tune"):
        assert weights[0][phase] - weights[1][phase] == round(1e6 * saved), phase


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    config = tiny_texts(tmp_path_factory.mktemp("byte-level"))
    return changed(config, "evaluation.windows=2", "evaluation.samples=0")


def test_a_run_that_was_stopped_resumes_to_the_same_bytes_with_its_own_words(texts, tmp_path):
    start(texts, tmp_path / "whole")
    folder = tmp_path / "stopped"
    with stopping_at(ATPTrainer, "export"):
        start(texts, folder)
    shutil.rmtree(folder / "checkpoints" / max(path.name for path in (folder / "checkpoints").glob("checkpoint-*")))
    (folder / "checkpoints" / "LATEST").unlink()
    words = (folder / "vocabulary.safetensors").read_bytes()
    start(texts, folder, resume=True)
    assert results(folder) == results(tmp_path / "whole")
    assert (folder / "vocabulary.safetensors").read_bytes() == words
    assert read(folder, "summary.json")["certificate"]["vocabulary_gap"] == 0.0


def test_resume_takes_the_words_of_the_folder_and_refuses_others(texts, tmp_path):
    folder = tmp_path / "run"
    with stopping_at(ATPTrainer, "export"):
        start(texts, folder)
    path = folder / "vocabulary.safetensors"
    kept = load_file(path)["kept"]
    whole = len(load_tokenizer(texts.model))
    other = torch.tensor(sorted({*kept.tolist()} | {index for index in range(whole) if index not in kept}))
    save_file({"kept": other}, path)
    with pytest.raises(InputError, match="^cannot resume: .*vocabulary.* not what the run was started with"):
        start(texts, folder, resume=True)
    path.unlink()  # choosing again gives the same
    start(texts, folder, resume=True)
    assert torch.equal(load_file(path)["kept"], kept)


def test_budgets_of_the_whole_model_count_the_kept_words(texts, tmp_path):
    numbered = changed(texts, "vocabulary.keep=300", "decisions.target_params=20000")
    share = share_of(numbered)
    shapes = load_shapes(numbered.model)
    plain = changed(numbered, "vocabulary.keep=null")
    assert share - share_of(plain) == pytest.approx(32 * (shapes.vocab_size - 300) / _decoder(texts))
    automatic = changed(numbered, "vocabulary.keep=auto")
    with pytest.raises(InputError, match="^decisions.target_params counts the words that vocabulary.keep=auto leaves"):
        share_of(automatic)
    automatic = changed(automatic, "training.steps=400", "training.tokens=700")
    summary = start(automatic, tmp_path / "run")
    assert summary["params_after"] == pytest.approx(20000, rel=0.02)
    plan = make_plan(automatic)
    assert plan["decisions"]["target_keep"] == pytest.approx(summary["target_keep"])
    kept = load_file(tmp_path / "run" / "vocabulary.safetensors")["kept"]
    shared = in_shares(changed(automatic, "training.tokens=null"))  # what the runs of a comparison begin with
    assert shared.decisions.target_keep == pytest.approx(summary["target_keep"])
    assert torch.equal(load_data(shared, load_tokenizer(shared.model)).vocabulary.kept, kept)


def test_a_smaller_budget_leaves_fewer_words(texts, tmp_path):
    """What a word's parameters are worth is the slope of the loss in the decoder at the share that words leave it."""
    shapes, decoder = load_shapes(texts.model), _decoder(texts)
    worth = worth_of_words(changed(texts, "decisions.target_keep=0.6"), shapes)
    assert worth(100) == worth(300) == pytest.approx(WORTH * 32 / decoder / 0.36)
    tokenizer, counts = load_tokenizer(texts.model), []
    words = [tokenizer.decode([index]).strip() for index in range(280, len(tokenizer))]
    rows = [{"text": " ".join(words[:: 1 + n % 40]) + f" {n}"} for n in range(80)]  # some words more often than others
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for target in (25000, 16000, 13500):
        config = changed(texts, f"decisions.target_params={target}", f"data.train={tmp_path / 'data.jsonl'}")
        worth = worth_of_words(config, shapes)
        for words in (280, 340):
            share, more = (share_of(changed(config, f"vocabulary.keep={words - n}")) for n in (0, 1))
            assert more - share == pytest.approx(32 / decoder)
            assert worth(words) == pytest.approx(WORTH * (1 / share - 1 / more), rel=0.02)
        counts.append(len(load_data(config, tokenizer).vocabulary.kept))
    assert counts[0] > counts[1] > counts[2]
    assert worth_of_words(changed(texts, "decisions.target_params=100"), shapes)(300) == math.inf


def _decoder(config):
    model = load_model(config.model, config.decisions.space)
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)


def test_a_plan_without_a_tokenizer_knows_a_number_and_says_what_it_does_not_know(texts, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(f"{texts.model.path}/config.json", bare)
    config = changed(texts, f"model.path={bare}")
    plan = make_plan(config)
    assert plan["vocabulary"]["words"]["after"] is None
    assert any("vocabulary.keep=auto goes by the data" in line for line in plan["remarks"])
    plan = make_plan(changed(config, "vocabulary.keep=300"))
    assert plan["vocabulary"]["words"]["after"] == 300
    assert plan["parameters"]["after"]["embedding"]["parameters"] == 300 * 32


def test_the_trainer_alone_trims_too(texts, tmp_path):
    trainer = ATPTrainer.from_config(changed(texts, f"output_dir={tmp_path / 'run'}", "training.steps=3"))
    trainer.train()
    trainer.export(tmp_path / "run")
    small = read_tokenizer(tmp_path / "run" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.vocab_size == len(small) < len(load_tokenizer(texts.model))


def test_what_cannot_be_trimmed_is_refused_before_anything_is_written(texts, config, tmp_path, monkeypatch):
    words = changed(config, "vocabulary.keep=auto", f"output_dir={tmp_path / 'run'}")
    with pytest.raises(InputError, match="its vocabulary is WordLevel and not BPE: set vocabulary.keep=null"):
        Run(words).execute()
    few = changed(texts, "vocabulary.keep=9", f"output_dir={tmp_path / 'run'}")
    with pytest.raises(InputError, match="^vocabulary.keep is 9, but [0-9]+ words have to stay"):
        Run(few).execute()
    monkeypatch.setattr(processes, "sharded", lambda: True)
    with pytest.raises(InputError, match="^vocabulary.keep takes rows out of a whole embedding"):
        Run(changed(few, "vocabulary.keep=auto")).execute()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_baseline_tunes_the_trimmed_model_too(texts, tmp_path):
    config = changed(texts, f"output_dir={tmp_path / 'run'}")
    summary = BaselineRun("magnitude", config, command="atp compare", say=lambda line: None).execute()
    small = read_tokenizer(tmp_path / "run" / "model")
    assert summary["vocabulary"]["words"]["after"] == len(small) == read_config(tmp_path / "run" / "model").vocab_size
    assert summary["certificate"]["vocabulary_gap"] == 0.0


@pytest.mark.slow
def test_targets_of_a_sweep_share_the_words(texts, tmp_path, wide_budget):
    targets = next(unit for unit in UNITS if unit.option == "keep").parse("0.5,0.7")
    here = Here(lambda line: None)
    Sweep(
        changed(texts, "training.open=2"), targets, tmp_path / "sweep", resume=False, command="", engine=here
    ).execute()
    kept = [load_file(path)["kept"] for path in (tmp_path / "sweep").glob("*/vocabulary.safetensors")]
    assert len(kept) == 3 and all(torch.equal(kept[0], other) for other in kept)


@pytest.mark.slow
def test_two_processes_trim_alike(texts, tmp_path):
    two, one = write_settings(texts, tmp_path)
    for name, path, several in (("two", two, True), ("one", one, False)):
        ended(launched(["train", str(path), f"output_dir={tmp_path / name}"], two=several))
    assert_equal(tmp_path / "two", tmp_path / "one")
    kept = [load_file(tmp_path / name / "vocabulary.safetensors")["kept"] for name in ("one", "two")]
    assert torch.equal(*kept)


def test_quantized_weights_keep_the_words(done, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantized, "throughput", partial(throughput, prompt_tokens=8, new_tokens=2, repeats=1))
    _, folder, _, _ = done
    path, _ = export(str(folder), "int8", None, tmp_path / "small")
    small = read_tokenizer(folder / "model")
    assert read_tokenizer(path).get_vocab() == small.get_vocab()
    ids = torch.tensor(encode(small, ["The quick brown fox"]))
    with torch.no_grad():
        before = read_model(folder / "model", torch.float32)(ids).logits
        after = AutoModelForCausalLM.from_pretrained(path)(ids).logits
    assert after.shape == before.shape and (after - before).abs().max() < 0.05 * before.abs().max()
