"""A cut model goes on training with TRL and stock PEFT, loads again, and is cut a second time by a run of ours."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from test_cut_again import WIDE, narrow
from tiny_command import read, start
from tiny_families import build
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp.config import ATPConfig
from atp.models.stock import save_model
from atp.removal import cut_model, logit_gap
from atp.removal.certify import LIMITS
from atp.spaces.space import MaskSpace

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def cut_folder(name, inputs, folder):
    """A model of layers with 4, 2 and 3 KV groups of 4, and 48, 31 and 20 channels, with the tokenizer of `inputs`."""
    shutil.copytree(inputs, folder)
    ends = {"vocab_size": len(AutoTokenizer.from_pretrained(folder)), "pad_token_id": 1, "eos_token_id": 1}
    model = build(name, **WIDE | ends)
    space = MaskSpace.from_config(model.config, "kv_group")
    save_model(cut_model(model, space, narrow(space, [4, 2, 3], [48, 31, 20])), folder)
    return folder


@pytest.mark.usefixtures("wide_budget")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_sft_trainer_tunes_a_cut_model_that_is_then_cut_again(config, tmp_path, name):
    folder = cut_folder(name, config.model.path, tmp_path / "cut")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == f"atp_{name}" and model.config.per_layer_attributes
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "sft"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, max_length=32,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    factors = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert len(factors) == 3 * 7 and all(p.any() for p in factors), "every linear of every width learned"

    trainer.save_model(str(tmp_path / "adapter"))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    tuned = trainer.model.eval()
    assert logit_gap(tuned, again, ids).absolute == 0
    assert logit_gap(AutoModelForCausalLM.from_pretrained(folder), again, ids).relative > 1e-4, "and it did learn"
    again.merge_and_unload().save_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert logit_gap(tuned, merged, ids).relative < 1e-5

    values = config.model_dump(mode="json")
    values["model"]["path"] = str(folder)
    values["evaluation"] |= {"dense_baseline": False, "windows": 4, "questions": 2}
    summary = start(ATPConfig.parse(values), tmp_path / "second")
    assert summary["params_before"] == sum(p.numel() for p in merged.parameters()) > summary["params_after"]
    certificate = read(tmp_path / "second", "certificate.json")
    for name in ("masked_vs_cut", "cut_vs_reloaded"):
        assert certificate[name] <= LIMITS[name]
