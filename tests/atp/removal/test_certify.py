"""The certificate's figures against differences that are known in closed form."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cut_lora import fill_lora
from zeroed import VOCAB, random_mask, stock_model, tokens

import atp  # noqa: F401  registers the class for reloading
from atp.lora.layer import add_lora
from atp.lora.regularizers.lasso import LoraGroups
from atp.removal import (
    certify_export,
    compare,
    cut_model,
    logit_gap,
    merge_adapter,
    reference_logits,
)
from atp.spaces.space import MaskSpace
from benchmarks.case import Variant
from benchmarks.measure import peak_bytes


def with_scaled_head(factor):
    model = stock_model(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    return model


def test_gap_of_a_scaled_head():
    ids = tokens(5)
    model, scaled = stock_model(dtype=torch.float32), with_scaled_head(1.5)
    with torch.no_grad():
        scale = float(model(ids).logits.abs().max())
    for gap in (
        logit_gap(model, scaled, ids, batch_size=2),
        compare(reference_logits(model, ids, batch_size=2), scaled, ids, batch_size=3),
    ):
        assert gap.scale == pytest.approx(scale, rel=1e-6)
        assert gap.absolute == pytest.approx(0.5 * scale, rel=1e-5)
        assert gap.relative == pytest.approx(0.5, rel=1e-5)
    assert logit_gap(model, model, ids).absolute == 0


def test_gap_covers_every_window():
    ids = tokens(5)
    model, spoiled = stock_model(dtype=torch.float32), stock_model(dtype=torch.float32)
    # Only the last window holds the token whose embedding differs.
    ids[ids == VOCAB - 1] = 1
    ids[4, 7] = VOCAB - 1
    with torch.no_grad():
        spoiled.model.embed_tokens.weight[VOCAB - 1] += 1
    assert logit_gap(model, spoiled, ids[:4], batch_size=2).absolute == 0
    assert logit_gap(model, spoiled, ids, batch_size=2).absolute > 0.1


def test_few_logits_live_beside_the_reference():
    model, ids = stock_model(dtype=torch.float32, vocab_size=5000), tokens(5)
    window = 4 * ids.shape[1] * 5000
    made = []
    reference = Variant(lambda: made.append(reference_logits(model, ids)))
    # The loop lets go of a window's logits when it has the next ones.
    assert peak_bytes(reference, "forward", "cpu") < (5 + 2.5) * window
    # A window's logits and their difference to the reference.
    assert peak_bytes(Variant(lambda: compare(made[0], model, ids)), "forward", "cpu") < 2.5 * window


@pytest.mark.parametrize("window", [0, 4])
def test_nan_is_never_dropped(window):
    ids = tokens(5)
    ids[ids == VOCAB - 1] = 1
    ids[window, 7] = VOCAB - 1
    model, broken = stock_model(dtype=torch.float32), stock_model(dtype=torch.float32)
    with torch.no_grad():
        broken.model.embed_tokens.weight[VOCAB - 1] = math.nan
    assert math.isnan(logit_gap(model, broken, ids, batch_size=2).relative)


def test_logits_are_float32_without_dropout_and_autocast_and_mode_is_kept():
    model = stock_model(dtype=torch.float32, attention_dropout=0.5)
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference = reference_logits(model, ids)
    assert reference.dtype == torch.float32 and model.training and not reference.requires_grad
    assert torch.equal(reference, expected)


def test_scripts_that_allow_narrow_products_do_not_change_a_certificate():
    """By TF32 or bfloat16 a correct cut would look like a wrong one; what the script has set comes back."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    model, seen = stock_model(dtype=torch.float32), []
    model.lm_head.register_forward_hook(lambda *_: seen.append([backend.fp32_precision for backend in backends]))
    expected, before = reference_logits(model, tokens()), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        allowed = [backend.fp32_precision for backend in backends]
        assert torch.equal(reference_logits(model, tokens()), expected) and allowed != ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == allowed
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(precisions == ["ieee", "ieee"] for precisions in seen) and len(seen) >= 2


def test_reference_for_other_tokens_is_refused():
    model = stock_model(dtype=torch.float32)
    with pytest.raises(ValueError, match="pass the same input_ids to both"):
        compare(reference_logits(model, tokens(2)), model, tokens(3))


def test_reload_finds_what_saving_changed(tmp_path):
    model = stock_model(dtype=torch.float32)
    space = MaskSpace.from_config(model.config)
    cut = cut_model(fill_lora(add_lora(model, space, r=3, alpha=6.0, dropout=0.0)), space, random_mask(space))
    ids = tokens()
    reference = reference_logits(cut, ids)
    merged = merge_adapter(cut)
    merged.save_pretrained(tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.suffix in (".bin", ".pt", ".pkl", ".pth")]
    saved = reference_logits(merged, ids)
    assert certify_export(cut, saved, tmp_path, ids)["cut_vs_reloaded_absolute"] == 0
    assert 0 <= compare(reference, merged, ids).relative < 1e-5

    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = 1.25 * state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spoiled = certify_export(cut, saved, tmp_path, ids)
    assert spoiled["cut_vs_reloaded"] == pytest.approx(0.25, rel=1e-5) and spoiled["merge_error"] == math.inf


def test_removed_lora_norm_is_the_joint_norm_of_a_removed_decision():
    model = stock_model(dtype=torch.float32)
    space = MaskSpace.from_config(model.config)
    model = add_lora(model, space, r=3, alpha=6.0, dropout=0.0)
    mlp = model.get_base_model().model.layers[1].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear.lora_A["default"].weight.zero_()
        mlp.gate_proj.lora_B["default"].weight[5] = torch.tensor([1.0, 2.0, 2.0])
        mlp.down_proj.lora_A["default"].weight[:, 5] = torch.tensor([0.0, 0.0, 4.0])
    mask = torch.ones(space.size, dtype=torch.bool)
    assert LoraGroups(model, space).largest_removed_norm(mask) == 0
    structure = next(s for s in space.layer(1) if s.name == "mlp")
    mask[structure.start + 5] = False
    assert LoraGroups(model, space).largest_removed_norm(mask) == pytest.approx(5.0)
    mask[structure.start + 5], mask[structure.start + 6] = True, False
    assert LoraGroups(model, space).largest_removed_norm(mask) == 0
