"""The files a run leaves: the cut, merged model for transformers, its adapter, the decisions and the certificate."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atp.files import whole_folder, write_json, write_tensors
from atp.masks.space import MaskSpace
from atp.removal import LogitGap, merge_adapter, reload_gap


def save_decisions(folder: Path, space: MaskSpace, mask: Tensor) -> None:
    """Writes decisions.safetensors (the flat mask) and decisions.json (kept indices a layer)."""
    write_tensors(folder / "decisions.safetensors", {"mask": mask.to(torch.uint8)}, {"space": space.name})
    layer = space.layer(0)
    content = {"space": space.name, "sizes": {s.name: s.size for s in layer}, "layers": space.kept_indices(mask)}
    write_json(folder / "decisions.json", content)


def export_model(
    model: PeftModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None, tokens: Tensor, card: str
) -> LogitGap:
    """Saves adapter/ and the merged model/ under `folder`, reloads the latter and compares. No pickle is written.

    tokens: int64 [windows, length]. Returns the gap between the cut model with its adapter and the reloaded one.
    """
    with whole_folder(folder / "adapter") as adapter:
        model.save_pretrained(adapter, safe_serialization=True)
    with whole_folder(folder / "model") as merged:
        merge_adapter(model).save_pretrained(merged, safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(merged)
        (merged / "README.md").write_text(card, encoding="utf-8")
    return reload_gap(model, folder / "model", tokens)
