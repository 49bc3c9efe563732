"""A model whose matrices are quantized, weights only, as a folder that transformers loads.

torchao and bitsandbytes quantize, pack and compute; transformers calls them, writes the folder and reads it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from atp.config import ATPConfig
from atp.data import load_recipe
from atp.evaluation import packed_windows, perplexity, throughput
from atp.evaluation.inference import CausalLM, bars
from atp.export.card import quantized_card
from atp.families import ExpertFamily, family_of, is_cut
from atp.ground import progress
from atp.ground.errors import InputError, reason
from atp.ground.files import whole_folder, write_text
from atp.ground.requirements import install_command
from atp.inputs.folders import CONFIG
from atp.inputs.loading import data_settings
from atp.inputs.loading import held_out as held_out_windows
from atp.models.load import read_model
from atp.models.stock import save_model


@dataclass(frozen=True)
class Scheme:
    """How matrices are quantized.

    package: import name of the library that does it. says: for people. outputs, inputs: what the number of rows and of
    columns of a matrix must be multiples of. settings: takes the names of modules to leave as they are and the model's
    dtype.
    """

    package: str
    says: str
    outputs: int
    inputs: int
    settings: Callable[[list[str], torch.dtype], QuantizationConfigMixin]

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether the library holds a matrix of this shape, and runs it on every processor."""
        return outputs % self.outputs == 0 and inputs % self.inputs == 0


def _int8(left: list[str], dtype: torch.dtype) -> QuantizationConfigMixin:
    from torchao.quantization import Int8WeightOnlyConfig

    # What torchao recommends to the compiler would hold for the whole process.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=left)


def _nf4(left: list[str], dtype: torch.dtype) -> QuantizationConfigMixin:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=left
    )


SCHEMES = {
    "int8": Scheme("torchao", "integers with a scale per row", 1, 1, _int8),
    # Scales run along rows of whole blocks of 64, and kernels for AVX-512 take 32 rows at a time.
    "nf4": Scheme("bitsandbytes", "4-bit NormalFloat with a scale per 64 weights", 32, 64, _nf4),
}
"""The forms that run on a CPU, are packed in safetensors, and load by `from_pretrained` alone."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows at hand. score: takes a model and returns the result of `perplexity`. count: of windows."""

    score: Callable[[CausalLM], dict[str, Any]]
    count: int


def held_out(run: Path, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """The windows that a run scored its models on. Raises `InputError` if its data cannot be read any more."""
    progress.begin("reading the held-out data")
    config = ATPConfig.load(run / CONFIG)
    test = held_out_windows(config, load_recipe(data_settings(config, tokenizer)), tokenizer)
    settings = config.evaluation
    windows = packed_windows(test, tokenizer, settings.windows)

    def score(model: CausalLM) -> dict[str, Any]:
        with progress.Bars(transient=True) as display:
            return perplexity(
                model, windows, settings.batch_size, max_windows=settings.windows, seed=config.seed,
                progress=bars(display, "scoring")("perplexity"),
            )  # fmt: skip

    return HeldOut(score, min(settings.windows, len(windows.input_ids)))


def write_quantized(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, out: Path, where: str,
    card: Path | None, facts: dict[str, Any], run: Path | None,
) -> list[str]:  # fmt: skip
    """Writes the folder, in one step, and returns what its user should know, one sentence each.

    name: a key of `SCHEMES`. where: names the model in messages. card, facts: as for `quantized_card`. run: the run
    folder that the model is from, on whose held-out windows it is scored before and after. Raises `InputError` if the
    scheme takes none of the model's matrices.
    """
    scheme, dtype, head = SCHEMES[name], model.dtype, model.get_output_embeddings()
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = [path for path, linear in linears.items() if linear is head]
    left = [
        path
        for path, linear in linears.items()
        if linear is not head and not scheme.fits(linear.out_features, linear.in_features)
    ]
    others = "experts, embeddings" if isinstance(family_of(model.config), ExpertFamily) else "embeddings"
    said = list(_summary(name, len(linears) - len(heads), left, others, str(dtype).removeprefix("torch."), where))
    windows = None
    try:
        windows = None if run is None else held_out(run, tokenizer)
    except InputError as error:
        said.append(f"perplexity was not measured, because the data of the run cannot be read ({reason(error)})")
    with whole_folder(out) as folder:
        # As transformers quantizes: while it reads a model from its files.
        whole = folder / "whole"
        progress.begin("writing the model as it is")
        save_model(model, whole)
        before = _measured(model, whole, windows)
        del model, head, linears  # the quantized one takes its place in memory
        progress.begin("quantizing")
        quantized = read_model(whole, "auto", quantization=scheme.settings([*heads, *left], dtype))
        shutil.rmtree(whole)
        progress.begin("writing")
        save_model(quantized, folder)  # before it runs, because bitsandbytes then packs anew
        tokenizer.save_pretrained(folder)
        after = _measured(quantized, folder, windows)
        rows = [(what, before[what], after[what]) for what in before]
        stock, needs = not is_cut(quantized.config), install_command([scheme.package])
        write_text(folder / "README.md", quantized_card(card, facts, said, rows, needs=needs, stock=stock))
    return [*said, *(f"{what}: {new}, before {old}" for what, old, new in rows)]


def _summary(name: str, count: int, left: list[str], others: str, dtype: str, where: str) -> Iterator[str]:
    """What becomes of the model's matrices. count: of all but the head. left: names of those that stay as they are.

    others: what is no matrix to these libraries, such as experts, whose weights are stacked.
    """
    scheme = SCHEMES[name]
    blocks = f"{name} takes multiples of {scheme.inputs} inputs and {scheme.outputs} outputs"
    if len(left) == count:
        raise InputError(f"no matrix of {where} can be quantized, because {blocks}: use --to int8")
    yield (
        f"{count - len(left)} of {count} matrices are {name}, {scheme.says} ({scheme.package}); {others}, norms "
        f"and the head stay {dtype}"
    )
    if left:
        yield f"{len(left)} matrices stay {dtype}, because {blocks} ({left[0]}, ...)"


def _measured(model: CausalLM, folder: Path, windows: HeldOut | None) -> dict[str, str]:
    """Size, perplexity and speed of a model and its folder, by what they are called in tables."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    found = {"weights on disk, MB": f"{size / 1e6:.1f}"}
    if windows is not None:
        score = windows.score(model)
        low, high = score["perplexity_interval"]
        counted = f"{score['counted']}, {windows.count} windows of {score['length']} tokens"
        found[f"held-out perplexity, {counted}"] = f"{score['perplexity']:.2f} ({low:.2f} to {high:.2f})"
    progress.begin("measuring speed")
    speed = throughput(model)
    for kind, digits in (("prefill", 0), ("decode", 1)):
        low, high = speed[f"{kind}_tokens_per_second_interval"]
        rate = speed[f"{kind}_tokens_per_second"]
        found[f"{kind}, tokens/s"] = f"{rate:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    return found
