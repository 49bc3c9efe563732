"""The baselines on every family: each runs, or refuses in a sentence."""

import pytest
import torch
from tiny_families import FAMILIES, SPACES, VOCAB, build, tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from atp.baselines.calibration import calibration_batches
from atp.baselines.methods import BASELINES
from atp.baselines.slicegpt import residual_bases, slice_model
from atp.baselines.tuner import stock_lora
from atp.config import ATPConfig
from atp.data import PackedDataset
from atp.decide.budget import Budget
from atp.families import family_of
from atp.ground.errors import InputError
from atp.spaces.space import MaskSpace

SLICED = ["llama", "mistral", "qwen2", "smollm3", "seed_oss", "granite", "ministral", "ministral3", "ernie4_5",
          "phi3", "glm", "arcee"]  # fmt: skip
REFUSED = {
    "qwen3": "its norms of queries and keys", "gemma2": "norms read the outputs of its blocks",
    "jais2": "its LayerNorms take the mean away",
}  # fmt: skip


def windows(count=6, length=16, seed=1):
    ids = tokens(count, length, seed)
    return PackedDataset(ids, ids.clone())


def config():
    return ATPConfig.parse(
        {
            "model": {"path": "tiny"},
            "output_dir": "unused",
            "decisions": {"space": "kv_group", "target_keep": 0.7, "saliency_windows": 2, "refit_windows": 4},
            "training": {"search": 2, "settle": 1, "tune": 2, "batch_size": 2, "precision": "float32", "warmup": 1},
        }
    )


@pytest.mark.parametrize(
    ("method", "family"),
    [
        (method, family)
        for method in ("random", "magnitude", "static", "llm_pruner", "wanda_sp", "disp_llm")
        for family in FAMILIES
        if (family, {"disp_llm": "disp"}.get(method, "kv_group")) in SPACES
    ],
)
def test_a_choice_is_made_and_cut(method, family):
    model, baseline, settings = build(family, scale=0.1), BASELINES[method], config()
    choice = baseline.choose(model, windows(), settings)
    space = baseline.space_of(model, settings)
    cut = baseline.apply(model, choice, windows(), settings)
    removed = Budget(space).total - Budget(space).kept(choice)
    assert sum(p.numel() for p in cut.parameters()) == sum(p.numel() for p in model.parameters()) - removed
    logits = cut(tokens()).logits
    assert logits.shape == (3, 14, VOCAB) and logits.isfinite().all() and removed > 0


@pytest.mark.parametrize("family", SLICED)
@torch.no_grad()
def test_slicegpt_without_slicing_changes_nothing(family, tmp_path):
    """Biases, layers without RoPE, masks per layer and multipliers included, also after a reload."""
    model = build(family, torch.float64)
    batches = calibration_batches(windows(), config(), torch.device("cpu"))
    bases = torch.linalg.qr(residual_bases(model, batches, model.config.hidden_size).double()).Q
    sliced, expected = slice_model(model, bases), model(tokens()).logits
    assert_close(sliced(tokens()).logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    sliced.float().save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(reloaded(tokens()).logits, sliced(tokens()).logits, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_lora_wraps_the_linears_of_the_family(family):
    wrapped = stock_lora(build(family), config())
    names = {n.split(".lora_A")[0].split("layers.1.")[-1] for n, _ in wrapped.named_parameters() if "layers.1." in n
             and "lora_A" in n}  # fmt: skip
    assert names == family_of(wrapped.config).linears(wrapped.config).keys()


def test_what_cannot_work_is_refused_before_a_comparison_starts():
    for family, reason in REFUSED.items():
        with pytest.raises(InputError, match=f"slicegpt does not fit model family '{family}': {reason}"):
            BASELINES["slicegpt"].check(build(family).config, config())
    shapes, settings = build("qwen3").config, config()
    for name, baseline in BASELINES.items():
        if name == "slicegpt":
            with pytest.raises(InputError, match="slicegpt does not fit model family 'qwen3'"):
                baseline.check(shapes, settings)
        elif baseline is not None:
            baseline.check(shapes, settings)
    settings.decisions.space = "head_dim"
    BASELINES["wanda_sp"].check(shapes, settings)
    with pytest.raises(InputError, match="'head_dim' does not fit model family 'qwen3'"):
        BASELINES["magnitude"].check(shapes, settings)


@pytest.mark.parametrize("family", ["qwen2", "granite"])
def test_slicegpt_slices_to_the_budget(family):
    model, settings = build(family, scale=0.1, hidden_size=64), config()
    sliced = BASELINES["slicegpt"].apply(
        model, BASELINES["slicegpt"].choose(model, windows(), settings), windows(), settings
    )
    assert sliced.config.hidden_size < 64 and sliced(tokens()).logits.isfinite().all()
    kept = sum(p.numel() for p in sliced.model.layers.parameters())
    assert 0.5 < kept / Budget(MaskSpace.from_config(model.config)).total < 0.9
