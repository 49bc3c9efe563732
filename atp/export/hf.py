"""The files a run leaves: the cut, merged model for transformers, the decisions, and the adapter with its base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.config import ATPConfig
from atp.export.card import adapter_card, base_card
from atp.export.sharded import save_sharded
from atp.families import family_of
from atp.ground import heap
from atp.ground.errors import NotReached
from atp.ground.files import whole_folder, write_json, write_tensors, write_text
from atp.models.stock import save_model, stock_config
from atp.processes import processes
from atp.processes.finite import first_non_finite
from atp.removal import certify_export, reference_logits
from atp.removal.certify import dtype_name, wider
from atp.removal.masters import as_stored
from atp.sharding.shards import is_sharded
from atp.spaces.space import MaskSpace


def save_decisions(folder: Path, space: MaskSpace, mask: Tensor) -> None:
    """Writes decisions.safetensors (the flat mask) and decisions.json (kept indices per layer).

    `sizes` says how many decisions a structure has: one number, or one per layer where layers differ.
    """
    write_tensors(folder / "decisions.safetensors", {"mask": mask.to(torch.uint8)}, {"space": space.name})
    sizes = {name: [s.size for s in structures] for name, structures in space.by_name().items()}
    same = {name: found[0] if len(set(found)) == 1 else found for name, found in sizes.items()}
    content = {"space": space.name, "sizes": same, "layers": space.kept_indices(mask)}
    write_json(folder / "decisions.json", content)


def export_model(
    model: PeftModel | PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: Tensor,
    card: str,
) -> dict[str, float | str]:
    """Saves the merged model/ under `folder`, reloads it and compares. No pickle is written.

    model: with an adapter, or trained whole. tokens: int64 [windows, length]. Returns what `certify_export` does.
    Raises `NotReached` for a merged weight that is not finite, before anything is written.
    """
    merged = as_stored(model)
    spoiled = first_non_finite(merged.named_parameters())
    if processes.sharded():
        spoiled = processes.any_of(spoiled)
    if spoiled is not None:
        raise NotReached(
            f"{spoiled} of the merged model holds NaN or infinity in {dtype_name(merged)}, so it was not exported: use "
            f"{wider(dtype_name(merged))}a lower training.lr"
        )
    reference = reference_logits(merged, tokens)
    _save(merged, folder / "model", tokenizer, card)
    del merged  # the reloaded one takes its place in memory
    heap.give_back()
    return certify_export(model, reference, folder / "model", tokens)


def keep_adapter(model: PeftModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None, config: ATPConfig) -> None:
    """Saves the unmerged base/ and the adapter/ that belongs to it under `folder`: together they are model/."""
    base, source = folder / "base", as_stored(model, merged=False)
    # An adapter on projections fits no class that has them in one linear, so this base stays in ours.
    own = bool(family_of(source.config).fused)
    _save(source, base, tokenizer, base_card(config), stock=not own)
    if not processes.is_main():
        return
    with whole_folder(folder / "adapter") as adapter:
        model.save_pretrained(str(adapter), safe_serialization=True)
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        settings["target_modules"].sort()  # PEFT writes a set in the order of its hashes
        write_json(adapter / "adapter_config.json", settings | {"base_model_name_or_path": str(base)})
        stock = not own and stock_config(source.config) is not None
        write_text(adapter / "README.md", adapter_card(config, stock=stock))


def _save(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None, card: str, *, stock: bool = True
) -> None:
    if is_sharded(model):
        save_sharded(model, folder, tokenizer, card)
        return
    with whole_folder(folder) as written:
        save_model(model, written, stock=stock)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        write_text(written / "README.md", card)
