"""The merged model of a sharded run, written layer by layer: one file each, in one folder with an index."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from atp.ground.files import whole_folder, write_json, write_text
from atp.models.stock import rope_for_converters, stock_config
from atp.processes import processes
from atp.sharding.shards import whole

_INDEX = "model.safetensors.index.json"


def save_sharded(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None, card: str) -> None:
    """Writes a sharded causal LM as `atp.models.stock.save_model` writes a whole one; all processes must call it.

    The main process writes and holds the weights of one part at a time, all processes gather them.
    """
    with ExitStack() as stack:
        written = processes.on_main(lambda: stack.enter_context(whole_folder(folder)))
        parts = _parts(model)
        files: dict[str, str] = {}
        for number, names in enumerate(parts, 1):
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            tensors = {name: _on_host(model.get_parameter(name)) for name in names}
            processes.on_main(partial(save_file, tensors, written / file, metadata={"format": "pt"}))
            files |= dict.fromkeys(names, file)
        processes.on_main(lambda: _write_rest(model, written, files, tokenizer, card))
        processes.on_main(stack.close)


def _on_host(parameter: Tensor) -> Tensor:
    """The whole weight in the main process; the others let go of it and hold nothing."""
    gathered = whole(parameter).detach()
    return gathered.cpu().contiguous() if processes.is_main() else torch.empty(0)


def _parts(model: PreTrainedModel) -> list[list[str]]:
    """Names of the weights by file: the embeddings, each layer, and the rest."""
    layers: Any = model.get_decoder().layers
    names = [name for name, _ in model.named_parameters()]
    inside = [[name for name in names if f".layers.{number}." in f".{name}"] for number in range(len(layers))]
    outside = [name for name in names if ".layers." not in f".{name}"]
    return [outside[:1], *inside, outside[1:]]


def _write_rest(
    model: PreTrainedModel, folder: Path, files: dict[str, str], tokenizer: PreTrainedTokenizerBase | None, card: str
) -> None:
    size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": files})
    config = stock_config(model.config) or model.config
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    rope_for_converters(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", card)
