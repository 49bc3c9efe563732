"""Families whose class of transformers fuses projections: split, trained and cut, and joined again."""

import json

import pytest
import torch
from test_stock import equal_mask
from tiny_families import build, random_mask, stock, tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from atp.config import ModelConfig
from atp.families import UnsupportedModel
from atp.ground.errors import InputError
from atp.inputs.loading import load_model
from atp.integrations import ATPCallback
from atp.lora.controller import MaskController
from atp.lora.layer import add_lora
from atp.models.fused import split_projections
from atp.models.load import read_config
from atp.models.stock import as_stock, save_model
from atp.processes import processes
from atp.removal import cut_model
from atp.spaces.space import MaskSpace

PART = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.75}
FACTORS = {"original_max_position_embeddings": 8, "long_factor": [1.5, 2.0, 4.0], "short_factor": [1.0, 1.1, 1.3]}
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75, **FACTORS}
WHOLE = LONG | {"partial_rotary_factor": 1.0, "long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
CASES = {
    "phi3": {}, "glm": {}, "glm4": {},
    "phi3-part": {"rope_parameters": PART, "sliding_window": None, "tie_word_embeddings": True},
    "phi3-long": {"rope_parameters": LONG, "original_max_position_embeddings": 8},
    "phi3-long-whole": {"rope_parameters": WHOLE, "original_max_position_embeddings": 8},
}  # fmt: skip


def made(case, make=build, dtype=torch.float32):
    return make(case.partition("-")[0], dtype, **CASES[case])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_split_model_computes_what_transformers_does_and_is_joined_bit_for_bit(case):
    """On texts below and beyond the original length of longrope, and with a cache."""
    for dtype, allowed in ((torch.float64, 1e-12), (torch.bfloat16, 0.03)):
        before, model = made(case, stock, dtype), made(case, build, dtype)
        assert not any(name.endswith(("qkv_proj", "gate_up_proj")) for name, _ in model.named_modules())
        assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
        for length in (6, 14):
            expected = before(tokens(length=length)).logits
            found = model(tokens(length=length)).logits
            assert_close(found, expected, rtol=0, atol=allowed * float(expected.abs().max()))
        again = as_stock(model)
        state = before.state_dict()
        assert type(again) is type(before) and again.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    before, model = made(case, stock), made(case)
    assert torch.equal(before.generate(tokens(2, 6), **greedy), model.generate(tokens(2, 6), **greedy))


@pytest.mark.parametrize("case", [case for case in CASES if "-" in case])
@torch.no_grad()
def test_heads_that_are_rotated_in_part_are_cut_and_reloaded(tmp_path, case):
    model = made(case, dtype=torch.float64)
    space = MaskSpace.from_config(model.config, "kv_group")
    lora = add_lora(model, space, r=2, alpha=4.0, dropout=0.0).double().eval()
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
    controller, mask = MaskController(lora, space), random_mask(space)
    for structure in space.by_name()["kv_group"]:
        mask[structure.span] = torch.tensor([structure.layer != 1, True])
    for form in ("sum", "base"):
        with controller.masks(mask, form):
            masked = lora(tokens()).logits
        if form == "sum":
            assert_close(cut_model(lora, space, mask)(tokens()).logits, masked, rtol=0, atol=1e-10)
    cut = cut_model(made(case), space, mask)
    assert len({layer.self_attn.q_proj.out_features for layer in cut.model.layers}) > 1
    save_model(cut, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(cut) and torch.equal(again(tokens()).logits, cut(tokens()).logits)
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    cached, plain = (again.generate(tokens(2, 9), use_cache=use, **greedy) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("case", "space_name", "expected"),
    [
        ("phi3-part", "kv_group", "Phi3ForCausalLM"),
        ("phi3-long", "mlp", "Phi3ForCausalLM"),
        ("phi3-long", "kv_group", "ATPPhi3ForCausalLM"),
        ("phi3-long-whole", "kv_group", "MistralForCausalLM"),
    ],
)
@torch.no_grad()
def test_equal_layers_take_the_class_that_holds_their_rope(tmp_path, case, space_name, expected):
    """Phi-3's own counts the factors of longrope by hidden_size and heads, which fit no fewer heads."""
    model = made(case)
    space = MaskSpace.from_config(model.config, space_name)
    cut = cut_model(model, space, equal_mask(space, {"kv_group": 1, "mlp": 17}))
    save_model(cut, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == expected
    for length in (6, 14):
        assert_close(again(tokens(length=length)).logits, cut(tokens(length=length)).logits, rtol=0, atol=1e-5)


def test_a_folder_is_split_on_loading_and_not_in_shards(tmp_path, monkeypatch):
    made("phi3", stock).save_pretrained(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path)), "kv_group")
    assert type(model).__name__ == "ATPPhi3ForCausalLM" and model.config.resid_pdrop == 0
    assert model.config.base_model_tp_plan["layers.*.self_attn.q_proj"] == "colwise"
    assert split_projections(model) is model
    monkeypatch.setattr(processes, "sharded", lambda: True)
    with pytest.raises(InputError, match="in one linear .self_attn.qkv_proj, mlp.gate_up_proj., which shards do not"):
        load_model(ModelConfig(path=str(tmp_path)), "kv_group")


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UnsupportedModel, match="its RoPE rotates 6 of 8 dimensions of a head, which the space pairs"):
        MaskSpace.from_config(made("phi3-part").config, "head_dim")
    made("glm", stock).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["rope_parameters"]["partial_rotary_factor"] = 1.5
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="partial_rotary_factor is 1.5: make it a share of a head"):
        read_config(tmp_path)


def test_a_loop_of_transformers_is_told_to_split_them_first(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens(20, 16, 1).tolist()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=4, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", optim="adamw_torch_fused",
    )  # fmt: skip

    def trained(model):
        settings = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        callback = ATPCallback(rows[:6], search=2, settle=1, decisions={"target_keep": 0.7})
        trainer = Trainer(get_peft_model(model, settings), arguments, train_dataset=rows, callbacks=[callback])
        trainer.train()
        return callback, callback.cut(trainer.model)

    with pytest.raises(InputError, match="in one linear .*split them with atp.models.fused.split_projections"):
        trained(made("phi3", stock))
    callback, smaller = trained(split_projections(made("phi3", stock)))
    assert callback.certificate["masked_vs_cut"] < 1e-5 and smaller(tokens()).logits.isfinite().all()
