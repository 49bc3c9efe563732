"""Whole runs in every dtype of weights: what is exported, that it certifies, and that an adapter fits its base."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from atp.ground.errors import InputError, NotReached
from atp.removal import logit_gap
from atp.removal.certify import USUAL_ROUNDING
from atp.run import Run


@pytest.fixture(autouse=True)
def wide_budget(monkeypatch):
    """One channel of the tiny model is more than the tolerance on the budget."""
    monkeypatch.setattr("atp.inputs.promises.BUDGET_TOLERANCE", 0.02)


def settings_of(config, folder, dtype="float32", keep_adapter=False):
    settings = config.model_copy(deep=True)
    settings.output_dir, settings.model.dtype = str(folder), dtype
    settings.evaluation.dense_baseline = False
    settings.export.keep_adapter = keep_adapter
    return settings


def run(settings):
    return Run(settings, resume=False, command="atp train", say=lambda line: None)


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def finished(request, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atp.inputs.promises.BUDGET_TOLERANCE", 0.02)
        summary = run(settings_of(config, folder, request.param, keep_adapter=True)).execute()
    return request.param, folder, summary


def test_a_run_ends_and_says_what_dtype_it_wrote(finished):
    dtype, folder, summary = finished
    certificate = read(folder, "certificate.json")
    assert (certificate["dtype"], certificate["computed_in"]) == (dtype, "float32")
    assert certificate["masked_vs_cut"] < 1e-4 and certificate["cut_vs_reloaded"] == 0
    assert 0 < certificate["merge_error"] <= 1
    assert 0 < certificate["rounding_gap"] < USUAL_ROUNDING[dtype] == certificate["rounding_gap_usually_below"]
    assert all(certificate[name] <= limit for name, limit in certificate["limits"].items())
    assert {t.dtype for t in load_file(folder / "model" / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert math.isfinite(summary["perplexity"]["final"])


def test_others_may_read_the_weights_as_they_may_the_config(finished):
    """safetensors 0.8 keeps its files to their owner, and a server often runs as somebody else."""
    _, folder, _ = finished
    plain = (folder / "summary.json").stat().st_mode
    for file in ("model/model.safetensors", "base/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / file).stat().st_mode == plain


def test_adapter_and_base_are_the_model(finished):
    """In float32 arithmetic they differ by what merging rounds."""
    dtype, folder, _ = finished
    ids = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(0))
    merged = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    alone = logit_gap(merged, base, ids).relative
    joined = logit_gap(merged, PeftModel.from_pretrained(base, folder / "adapter"), ids).relative
    assert joined < USUAL_ROUNDING[dtype] and joined < alone / 3, "the adapter matters in this test"
    named = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32)
    assert logit_gap(merged, named, ids).relative == joined
    assert {t.dtype for t in load_file(folder / "base" / "model.safetensors").values()} == {getattr(torch, dtype)}


def test_the_adapter_names_its_base_in_a_stable_order_and_has_a_card(finished):
    _, folder, _ = finished
    adapter = read(folder, "adapter/adapter_config.json")
    assert adapter["base_model_name_or_path"] == str(folder / "base")
    assert adapter["target_modules"] == sorted(adapter["target_modules"])
    assert list(adapter) == sorted(adapter)
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "../base" in card and "PeftModel.from_pretrained" in card and "More Information Needed" not in card
    assert "../adapter" in (folder / "base" / "README.md").read_text(encoding="utf-8")


def changed(config, folder, dtype=torch.float32, change=lambda model: None):
    """The tiny model after a change, with its tokenizer, in another folder."""
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(config.model.path) / name, folder)
    return str(folder)


def test_a_cut_is_smaller_on_disk_than_what_it_was_cut_from(config, tmp_path):
    """Without model.dtype weights stay in the dtype of the source, and the table has the sizes of the files.

    And without being asked for there is no adapter, which would fit nothing.
    """
    settings = settings_of(config, tmp_path / "run", "auto")
    settings.model.path = changed(config, tmp_path / "narrow", torch.bfloat16)
    summary = run(settings).execute()
    before, after = (tmp_path / folder / "model.safetensors" for folder in ("narrow", "run/model"))
    assert {t.dtype for t in load_file(after).values()} == {torch.bfloat16}
    assert after.stat().st_size < before.stat().st_size
    for name, file in (("original", before), ("final", after)):
        assert summary["megabytes"][name] == pytest.approx(sum(t.nbytes for t in load_file(file).values()) / 1e6)
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "base").exists()


def break_a_weight(model):
    model.model.embed_tokens.weight[-1, 0] = math.nan


def overflow(model):
    """Its weights are finite in float16, what they give is not."""
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.fill_(300.0)
        layer.mlp.up_proj.weight.fill_(300.0)


@pytest.mark.parametrize(
    ("change", "dtype", "error", "message", "absent"),
    [
        (break_a_weight, "float32", InputError, "embed_tokens.weight holds NaN or infinity", ""),
        (overflow, "float16", NotReached, "not finite", "checkpoints"),
    ],
)
def test_what_is_no_number_ends_a_run_before_it_trains(config, tmp_path, change, dtype, error, message, absent):
    settings = settings_of(config, tmp_path / "run", dtype)
    settings.model.path = changed(config, tmp_path / "changed", change=change)
    with pytest.raises(error, match=message):
        run(settings).execute()
    assert not (tmp_path / "run" / absent).exists()
