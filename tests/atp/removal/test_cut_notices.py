"""A cut model does not claim to lie in the folder of the whole one, so no library reads that folder in its stead."""

import logging

import pytest
import torch
from peft import get_peft_model_state_dict
from tiny_folder import save
from transformers import AutoModelForCausalLM

from atp.lora.layer import add_lora
from atp.models import ATPLlamaConfig
from atp.models.stock import save_model
from atp.removal import cut_model, merge_adapter
from atp.spaces.space import MaskSpace

NOTICE = "You are using a model of type"


class Kept(logging.Handler):
    """Keeps the messages that it is handed."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def notices(monkeypatch):
    """What transformers logs, as text, whatever earlier tests in this process made of its logger."""
    kept = Kept()  # not caplog's handler: the root has that one too, and a logger that propagates would count twice
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)  # a command has set it
    monkeypatch.setattr(logger, "handlers", [kept])
    monkeypatch.setattr(logger, "propagate", False)
    level = logger.level
    logger.setLevel(logging.WARNING)  # a command has raised it to errors
    yield lambda: [message for message in kept.messages if NOTICE in message]
    logger.setLevel(level)


def test_neither_a_cut_nor_loading_prints_that_types_differ(tmp_path, notices):
    whole = save(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(whole)
    space = MaskSpace.from_config(model.config, "kv_group")
    mask = torch.ones(space.size, dtype=torch.bool)
    mask[-1] = False  # an MLP channel of the last layer
    lora = add_lora(model, space, r=2, alpha=2.0, dropout=0.0)
    cut = cut_model(lora, space, mask)
    get_peft_model_state_dict(cut)
    cut.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(cut)
    save_model(merged, tmp_path / "cut")
    assert cut.get_base_model().config.name_or_path == merged.config.name_or_path == ""
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert again.config.name_or_path == str(tmp_path / "cut") and again.config.model_type == "atp_llama"
    assert notices() == []
    ATPLlamaConfig.from_pretrained(whole)
    assert len(notices()) == 1, "this is how it would have been seen"
