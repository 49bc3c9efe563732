"""The one place that reads models: from safetensors or GGUF in the model's own folder, without running its code.

Everything that a folder or a Hub repository names is checked before transformers opens it: `trust_remote_code` is
False, pickled weights are refused, and no name in an index or a config may lead to another folder. Links are followed,
because the Hub's cache consists of them.
"""

from __future__ import annotations

import copy
import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    TOKENIZER_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)
from transformers.utils import cached_file

from atp.ground.errors import InputError, is_out_of_memory, reason, shorten
from atp.models.gguf_header import without_vocabulary
from atp.models.sizes import check_against_files, check_rope, check_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 2**22  # bytes of a safetensors header: some 40,000 weights; a million take transformers minutes
_MOST_GROWTH = 1000  # characters that a tokenizer may make of one
_MAIN = "main"  # the revision of a Hub name that names none
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_config(path: str | Path, gguf_file: str | None = None, revision: str | None = None) -> PretrainedConfig:
    """The config of a model folder, a Hub name or a GGUF file in either. Raises `InputError`.

    revision: commit, tag or branch of a Hub name; None: its main branch. A folder has none, and refuses one.
    """
    with _explained("model", path):
        where = _where(path, gguf_file, revision)
        if "gguf_file" in where:
            content = _gguf_content(str(path), where["gguf_file"], revision)
            if "num_hidden_layers" not in content:  # transformers would take 32, and seconds to name their weights
                raise InputError(f"{gguf_file} does not say how many layers its model has: get or write the file again")
            check_sizes(content)
            config = AutoConfig.for_model(**copy.deepcopy(content))
        else:
            check_sizes(PretrainedConfig.get_config_dict(path, revision=revision or _MAIN)[0])
            config = AutoConfig.from_pretrained(path, revision=revision or _MAIN, trust_remote_code=False)
        attention = str(config._attn_implementation)
        if "/" in attention:
            raise InputError(
                f"{path} asks for attention code '{shorten(attention)}' of the Hub, which is never run: remove "
                "attn_implementation from its config.json"
            )
        check_rope(config)
        return config


def read_tokenizer(
    path: str | Path, gguf_file: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, a Hub name or a GGUF file in either; revision: as in `read_config`."""
    with _explained("tokenizer", path):
        where = _where(path, gguf_file, revision)
        if gguf_file is None and (file := _find(path, "tokenizer_config.json", revision)) is not None:
            for name in json.loads(file.read_text(encoding="utf-8")).get("fast_tokenizer_files", []):
                _require_inside(name, file)
        if gguf_file is None and (file := _find(path, "tokenizer.json", revision)) is not None:
            _check_growth(file)
        reader: Any = AutoTokenizer
        if gguf_file is not None and _find(path, "tokenizer_config.json", revision) is None:
            # What AutoTokenizer takes too, after it has read the header again, which takes seconds.
            found: Any = TOKENIZER_MAPPING.get(type(read_config(path, gguf_file, revision)), TokenizersBackend)
            if found.__name__ != "MistralCommonBackend":  # which depends on further files
                reader = found
        tokenizer = reader.from_pretrained(**where, revision=revision or _MAIN, trust_remote_code=False)
        # transformers makes some tokenizers from nothing but a config.json.
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            raise InputError(f"'{path}' has no tokenizer: add the tokenizer files of the model")
        for name in ("is_local", "local_files_only"):  # how it was found here, which transformers would export with it
            tokenizer.init_kwargs.pop(name, None)
        return tokenizer


def read_model(
    path: str | Path, dtype: torch.dtype | str, gguf_file: str | None = None, revision: str | None = None,
    quantization: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:  # fmt: skip
    """The causal LM of a model folder, a Hub name or a GGUF file in either, in evaluation mode.

    dtype: of the loaded weights; "auto" keeps that of the file. revision: as in `read_config`. quantization: how to
    quantize them, on the CPU. Raises `InputError` for a model that is missing, incomplete, not in safetensors, or in
    need of code of its own.
    """
    from transformers import AutoModelForCausalLM, GgufConfig  # seconds, which configs and tokenizers do not take

    config = read_config(path, gguf_file, revision)
    with _explained("model", path):
        options: dict[str, Any] = _where(path, gguf_file, revision)
        if gguf_file is None:
            check_against_files(config, sum(file.stat().st_size for file in weight_files(path, config, revision)))
        else:
            # For a wrong number of layers the reader takes minutes before it misses the first of them.
            if (file := _find(path, gguf_file, revision)) is not None:
                check_against_files(config, file.stat().st_size, many=0)
            # Without dequantize the model counts as quantized and can be neither trained nor saved.
            options["quantization_config"] = GgufConfig(dequantize=True)
        if quantization is not None:
            options |= {"quantization_config": quantization, "device_map": "cpu"}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **options, revision=revision or _MAIN, config=config, dtype=dtype, trust_remote_code=False,
            use_safetensors=True,
            # Shapes that differ are then reported with the rest, and refused below.
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        model, found = loaded
        require_whole(path, found)
        return model


def commit(path: str | Path, gguf_file: str | None = None, revision: str | None = None) -> str | None:
    """The commit of a Hub name, 40 digits, as the cache holds it; None for a folder, and where it is not known."""
    if os.path.isdir(path):
        return None
    file = _find(path, gguf_file or "config.json", revision)
    known = None if file is None else re.search(r"snapshots/([0-9a-f]{40})/", file.as_posix())
    return None if known is None else known[1]


@cache
def _gguf_content(path: str, gguf_file: str, revision: str | None) -> dict[str, Any]:
    """The config in a GGUF file's header, as transformers reads it.

    That takes seconds for a vocabulary, so it gets a copy without one, and the file itself where that fails.
    """
    file = _find(path, gguf_file, revision)
    with suppress(ValueError, KeyError, IndexError, TypeError, OSError, struct.error), TemporaryDirectory() as folder:
        if file is not None:
            tokens = without_vocabulary(file, Path(folder) / "header.gguf")
            content = PretrainedConfig.get_config_dict(folder, gguf_file="header.gguf")[0]
            return content if tokens is None else {"vocab_size": tokens} | content
    return PretrainedConfig.get_config_dict(path, gguf_file=gguf_file, revision=revision or _MAIN)[0]


def _where(path: str | Path, gguf_file: str | None, revision: str | None) -> dict[str, Any]:
    """The arguments of `from_pretrained` that locate the model, but for the revision."""
    if revision is not None and os.path.isdir(path):
        raise InputError(f"{path} is a folder, which has no revision {shorten(revision)}: leave out model.revision")
    if gguf_file is None:
        return {"pretrained_model_name_or_path": path}
    _require_inside(gguf_file, Path(path) / "gguf_file")
    if os.path.isdir(path):
        # transformers takes the weights from a file of that name in the working directory, if there is one.
        file = Path(path).resolve() / gguf_file
        if not file.is_file():
            raise InputError(f"{file} does not exist: check model.path and model.gguf_file")
        gguf_file = str(file)
    return {"pretrained_model_name_or_path": path, "gguf_file": gguf_file}


def weight_files(path: str | Path, config: PretrainedConfig, revision: str | None) -> list[Path]:
    """The safetensors files of a model; files that the Hub has and the cache lacks are downloaded.

    Refuses weights that transformers would unpickle, take from another folder, or mix with an adapter's.
    """
    if _find(path, "adapter_config.json", revision) is not None:
        raise InputError(
            f"{path} holds an adapter, which belongs to another model: merge it (PEFT's merge_and_unload) and save the "
            "result, or remove adapter_config.json"
        )
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        _require_inside(named, Path(path) / "config.json", (".safetensors", ".safetensors.index.json"))
    names = (_WEIGHTS, _INDEX) if named is None else (named,)
    weights = next((file for name in names if (file := _find(path, name, revision)) is not None), None)
    if weights is None:
        pickled = next((name for name in _PICKLED if _find(path, name, revision) is not None), None)
        has = f" but {pickled}, which is never read" if pickled else ""
        raise InputError(
            f"cannot load the model from '{path}': it has no {names[0]}{has}: load it once where you trust it and "
            "write it with save_pretrained(..., safe_serialization=True)"
        )
    # A link of the Hub's cache keeps its name; what it points to has none.
    files = _shards(path, weights, revision) if weights.name.endswith(".index.json") else [weights]
    for file in files:
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
        if _LARGEST_HEADER < size <= file.stat().st_size:  # one beyond the end is damage, which its reader names
            raise InputError(
                f"the header of {file} has {size:,} bytes, and no model's has more than {_LARGEST_HEADER:,}: fetch the "
                "model again"
            )
    return files


def _check_growth(file: Path) -> None:
    """Raises `InputError` for a tokenizer.json that replaces a character by so many that a short text fills memory."""
    text = file.read_text(encoding="utf-8")
    if '"Replace"' not in text and '"Prepend"' not in text:  # which saves a second reading of a large vocabulary
        return
    content = json.loads(text)
    for part in ("normalizer", "decoder"):
        growth, left = 1.0, [content.get(part)]
        while left:
            value = left.pop()
            if isinstance(value, dict):
                growth *= _growth(value)
            left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if growth > _MOST_GROWTH:
            raise InputError(
                f"the {part} of {file} makes up to {growth:,.0f} characters of one: use the model's own tokenizer"
            )


def _growth(step: dict[str, Any]) -> float:
    """Characters that a step of a tokenizer may make of one."""
    if step.get("type") == "Prepend":
        return 1 + len(step.get("prepend") or "")
    if step.get("type") != "Replace":
        return 1
    pattern, new = step.get("pattern"), len(step.get("content") or "")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1, new / len(literal)) if literal else 1 + new  # a regular expression may match nothing, anywhere


def _shards(path: str | Path, index: Path, revision: str | None) -> list[Path]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is no index of shards ({reason(error)}): fetch the model again") from error
    if not shards:
        raise InputError(f"{index} names no shard: fetch the model again")
    for shard in shards:
        _require_inside(shard, index, (".safetensors",))
    files = {shard: _find(path, shard, revision) for shard in sorted(shards)}
    for shard, file in files.items():
        if file is None:
            raise InputError(f"{index} names {shard}, which is not there: fetch the model again")
    return [file for file in files.values() if file is not None]


def _find(path: str | Path, name: str, revision: str | None) -> Path | None:
    """A file of a model folder or a Hub repository, which is then in the cache; None if there is no such file."""
    if os.path.isdir(path):
        file = Path(path) / name
        return file if file.is_file() else None
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(str(path), name, revision=revision or _MAIN, **quiet)
    return None if found is None else Path(found)


def _require_inside(name: object, where: Path, suffixes: tuple[str, ...] = ("",)) -> None:
    """Refuses a name that leads out of the folder of the file that holds it, or to a file of another kind."""
    # A Windows path knows both separators and drives.
    windows = PureWindowsPath(name) if isinstance(name, str) else PureWindowsPath()
    inside = isinstance(name, str) and name.endswith(suffixes) and not windows.anchor and ".." not in windows.parts
    if not name or not inside:
        kind = f" that ends in {suffixes[0]}" if suffixes[0] else ""
        raise InputError(f"{where} names {shorten(repr(name))}: give a plain file name in the same folder{kind}")


def require_whole(path: str | Path, found: dict[str, Any]) -> None:
    """Refuses a model if weights would be initialized at random, or weights of the file ignored.

    found: what transformers reports of loading, `missing_keys`, `mismatched_keys` and `unexpected_keys`.
    """
    # Layers of old checkpoints hold a buffer that is computed now.
    unexpected = sorted(name for name in found["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq"))
    reshaped = [f"{name} {list(there)} for {list(here)}" for name, there, here in sorted(found["mismatched_keys"])]
    problems = {
        "are missing in its files": sorted(found["missing_keys"]),
        "have another shape in its files": reshaped,
        "of its files have no place in it": unexpected,
    }
    for what, names in problems.items():
        if names:
            counted = "1 weight" if len(names) == 1 else f"{len(names)} weights"
            raise InputError(
                f"cannot load the model from '{path}': {counted} {what} ({', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''}): fetch the model again, or correct its config.json"
            )


@contextmanager
def _explained(what: str, path: str | Path) -> Iterator[None]:
    """Turns whatever transformers raises on a foreign folder into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise InputError(
                f"cannot load the {what} from '{path}': it needs code of its own, which is never run: give a model of "
                "a family that transformers knows"
            ) from error
        # For a path that does not exist, transformers complains that it is no Hub name.
        why = "no such folder" if os.path.isabs(path) and not os.path.isdir(path) else reason(error)
        raise InputError(
            f"cannot load the {what} from '{path}': give the folder of a whole model or a Hub name ({why})"
        ) from error
