"""The kept words as a tokenizer, and as the rows of a model; ids are renumbered in the order of the old ones."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp.ground.errors import InputError, shorten
from atp.models.load import read_tokenizer
from atp.vocabulary.merges import pairs, processors

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_IDS = re.compile(r"_token_(id|ids|index)$")  # keys of a config that hold ids, as eos_token_id
_ONLY = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")  # of generation: what never to write
_BY_ID = ("sequence_bias", "forced_decoder_ids")


def trimmed_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Tensor) -> PreTrainedTokenizerBase:
    """The tokenizer with the kept words alone; a text of kept words has the same tokens, by their new ids.

    kept: int64 [words], as `kept_words` returns them. Every merge of kept tokens stays. Raises `InputError` where
    transformers would give other ids when it reads the tokenizer back.
    """
    new = {old: index for index, old in enumerate(kept.tolist())}
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for entry in folder.iterdir():  # other files hold the whole vocabulary
            if entry.is_dir() and entry.name != "additional_chat_templates":
                shutil.rmtree(entry)
            elif entry.is_file() and entry.name not in _FILES:
                entry.unlink()
        try:
            _rewrite(folder / "tokenizer.json", lambda content: _trimmed_content(content, new))
        except KeyError as error:
            raise InputError(
                f"the tokenizer needs the word with id {error}, which is not among the words that were kept: put back "
                "the tokenizer that they were chosen for, or start a new run in another output_dir"
            ) from None
        _rewrite(folder / "tokenizer_config.json", lambda content: _trimmed_settings(content, new))
        found = read_tokenizer(folder)
    expected = {token: new[index] for token, index in tokenizer.get_vocab().items() if index in new}
    if (got := found.get_vocab()) != expected:
        unlike = next(token for token in {**expected, **got} if expected.get(token) != got.get(token))
        raise InputError(
            f"the vocabulary of this model cannot be trimmed, because its tokenizer gives '{shorten(unlike)}' another "
            "id when it is read back: set vocabulary.keep=null"
        )
    found.name_or_path = tokenizer.name_or_path
    found.model_max_length = tokenizer.model_max_length
    return found


def _trimmed_content(content: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
    """A tokenizer.json with the words in `new` alone, changed in place. new: from old ids to new ones."""
    model = content["model"]
    words = {token: new[index] for token, index in model["vocab"].items() if index in new}
    listed = zip(model["merges"], pairs(model), strict=True)
    model["merges"] = [merge for merge, (a, b) in listed if a in words and b in words and a + b in words]
    model["vocab"] = dict(sorted(words.items(), key=lambda item: item[1]))
    for token in content["added_tokens"]:
        token["id"] = new[token["id"]]
    for step in processors(content.get("post_processor")):
        for special in (step.get("special_tokens") or {}).values():
            special["ids"] = [new[index] for index in special["ids"]]
        for key in ("sep", "cls"):
            if key in step:
                step[key] = [step[key][0], new[step[key][1]]]
    if content.get("padding"):
        content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
    return content


def named_ids(config: PretrainedConfig) -> set[int]:
    """The ids that a model's config names: of the beginning, the end, padding, images."""
    return {index for _, value in _keyed(config) for index in (value if isinstance(value, list) else [value])}


def trimmed_config(config: PretrainedConfig, kept: Tensor) -> PretrainedConfig:
    """The config of the trimmed model. kept: as in `trimmed_tokenizer`. An id without a word becomes null."""
    config = copy.deepcopy(config)
    _renumber(config, {old: index for index, old in enumerate(kept.tolist())})
    config.vocab_size = len(kept)
    return config


@torch.no_grad()
def trim_model(model: PreTrainedModel, kept: Tensor) -> None:
    """Leaves the model the rows of the kept words, in place: of its embedding and its head, tied or not.

    kept: int64 [words], ascending. Also its config and its generation config, in which an id without a word becomes
    null. Raises `InputError` for other weights with a row for each word, before anything is changed.
    """
    words, parts = model.config.vocab_size, [model.get_input_embeddings(), model.get_output_embeddings()]
    inside = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside and words in parameter.shape[:1] and ".layers." not in name:
            raise InputError(
                f"the vocabulary of this model cannot be trimmed, because {name} has a row for each word too: set "
                "vocabulary.keep=null"
            )
    settings = model.generation_config
    if any(getattr(settings, key, None) for key in _BY_ID):
        raise InputError(
            "generation_config.json of the model holds sequence_bias or forced_decoder_ids, which name words: remove "
            "them, or set vocabulary.keep=null"
        )
    new = {old: index for index, old in enumerate(kept.tolist())}
    embedding, head = parts
    tied = head is not None and head.weight is embedding.weight
    for part in parts[: 1 if head is None else 2]:
        for name, parameter in list(part.named_parameters(recurse=False)):
            rows = embedding.weight if tied and part is head and name == "weight" else nn.Parameter(
                parameter[kept.to(parameter.device)].clone(), requires_grad=parameter.requires_grad
            )  # fmt: skip
            setattr(part, name, rows)
    embedding.num_embeddings = len(kept)
    if head is not None:
        head.out_features = len(kept)
    for module in model.modules():
        known: Any = module
        if getattr(module, "vocab_size", None) == words:
            known.vocab_size = len(kept)
        if getattr(module, "padding_idx", None) is not None:
            known.padding_idx = new.get(known.padding_idx)
    config = trimmed_config(model.config, kept)
    for key, _ in [("vocab_size", None), *_keyed(model.config)]:
        setattr(model.config, key, getattr(config, key))
    if settings is not None:
        _renumber(settings, new)
        for key in _ONLY:
            if (listed := getattr(settings, key, None)) is not None:
                setattr(settings, key, _kept_alone(listed, new) or None)


def _keyed(config: Any) -> Iterator[tuple[str, Any]]:
    """(key, id or ids) of a config that names ids."""
    for key, value in config.to_dict().items():
        listed = value if isinstance(value, list) else [value]
        if _IDS.search(key) and listed and all(isinstance(index, int) for index in listed):
            yield key, value


def _renumber(config: Any, new: dict[int, int]) -> None:
    for key, value in list(_keyed(config)):
        if isinstance(value, list):
            setattr(config, key, [new[index] for index in value if index in new] or None)
        else:
            setattr(config, key, new.get(value))


def _kept_alone(listed: list[Any], new: dict[int, int]) -> list[Any]:
    """Ids by their new numbers; sequences with a word that is gone cannot be written any more, and are left out."""
    if all(isinstance(index, int) for index in listed):
        return [new[index] for index in listed if index in new]
    return [[new[index] for index in words] for words in listed if all(index in new for index in words)]


def _trimmed_settings(content: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
    added = content.get("added_tokens_decoder")
    if added is not None:
        content["added_tokens_decoder"] = {str(new[int(i)]): token for i, token in added.items() if int(i) in new}
    if content.get("pad_token_id") is not None:
        content["pad_token_id"] = new.get(content["pad_token_id"])
    return content


def _rewrite(path: Path, change: Any) -> None:
    content = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
