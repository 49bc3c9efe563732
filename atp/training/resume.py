"""Whether a run may be resumed: under its own config, from its own inputs (as hashes), with an intact checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from atp.config import ATPConfig, ResolvedConfig
from atp.data import Splits
from atp.data.encoding import rules_of
from atp.ground.errors import InputError
from atp.ground.files import read_json, sha256
from atp.inputs.folders import CHECKPOINTS, INPUTS, RESOLVED, saved_config
from atp.inputs.precision import AUTO
from atp.inputs.resolve import resolve
from atp.inputs.targets import TIMED
from atp.processes import processes
from atp.sharding.shards import whole
from atp.training.checkpoint import Checkpoint, exist, newest, read_values, resume_point
from atp.training.data import sized
from atp_kernels import QuantizedWeight

# Keys that differ between folders and versions of transformers for one and the same model.
_NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
# What an adapter adds to parameter names.
_WRAPPING = re.compile(r"^base_model\.model\.|\.base_layer(?=\.)")


def fingerprints(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, **splits: Dataset
) -> dict[str, str]:
    """Name of an input -> SHA-256: base weights, model config, tokenizer, and the samples of each split.

    model: a causal LM, with or without an adapter, whose parameters do not count. Hashing reads the
    weights once, at the speed of SHA-256 on all cores. Raises `InputError` in all processes if one has other inputs.
    """
    found = {"base weights": _of_weights(model), "model config": _of_text(_config(model.config))}
    if tokenizer is not None:
        found["tokenizer"] = _of_text(_tokenizer(tokenizer))
    found |= {f"{name} data": of_samples(split) for name, split in splits.items()}
    processes.refuse_differences(found, "reads", processes.SAME_FILES)
    return found


def refuse_other_data(tokenizer: PreTrainedTokenizerBase, splits: Splits) -> None:
    """Raises `InputError` in all processes if one has another tokenizer or other splits.

    The number of steps may depend on them, so all must know before they wait for each other elsewhere.
    """
    if processes.count() > 1:
        found = {f"{name} data": digest for name, digest in splits.fingerprints.items()}
        found["tokenizer"] = _of_text(_tokenizer(tokenizer))
        processes.refuse_differences(found, "reads", processes.SAME_FILES)


def refuse_other_inputs(started_with: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises `InputError` naming the inputs that changed since the start; those that one side lacks are skipped."""
    changed = [name for name, digest in now.items() if started_with.get(name, digest) != digest]
    if changed:
        verb = "is" if len(changed) == 1 else "are"
        raise InputError(
            f"cannot resume: {', '.join(changed)} {verb} not what the run was started with: put back what was there, "
            "or start a new run in another output_dir"
        )


def refuse_other_config(config: ATPConfig, folder: Path) -> None:
    """Raises `InputError` for another config than the run folder's, or checkpoints that cannot be continued."""
    for root in (folder / name for name in CHECKPOINTS):
        if exist(root):
            resume_point(root, say=lambda line: None)  # the trainer says what is damaged when it resumes
    _refuse_change(config, folder, _resolved(folder))


def begun(config: ATPConfig) -> ResolvedConfig | None:
    """What the run computes with that this config started in its output_dir; None where there is none.

    What makes no difference to a run (`ATPConfig.refuse_change_of`) is that of this config.
    """
    folder = Path(config.output_dir)
    resolved = _resolved(folder)
    if resolved is None:
        return None
    with suppress(InputError):
        _refuse_change(config, folder, resolved)
        here = {"sharding": config.training.sharding, "offload": config.training.offload}
        return resolved.model_copy(update={"training": resolved.training.model_copy(update=here)})
    return None


def _refuse_change(config: ATPConfig, folder: Path, resolved: ResolvedConfig | None) -> None:
    """Raises `InputError` for another config than that of a folder's run. resolved: what that run computes with."""
    asked = saved_config(folder)
    if resolved is None:  # it has not trained yet, and resolves once more
        config.refuse_change_of(asked or config.model_dump(mode="json"))
        return
    values = resolved.model_dump(mode="json")
    if asked is not None:
        config.refuse_change_of(asked, values)
    else:  # nobody knows what was asked for, but what is given now has to come to the same
        _as_resolved(config, resolved).refuse_change_of(values)


def _resolved(folder: Path) -> ResolvedConfig | None:
    """What the run of a folder computes with: by its own file, or its newest checkpoint where that is damaged."""
    for values_of in (lambda: saved_config(folder, RESOLVED), lambda: _newest_values(folder).get("config")):
        with suppress(ValidationError):
            return ResolvedConfig.model_validate(values_of())
    return None


def _as_resolved(config: ATPConfig, resolved: ResolvedConfig) -> ResolvedConfig:
    """The config resolved by what was found for a run that is resolved already."""
    filled = ATPConfig.model_validate(_filled(config.model_dump(), resolved.model_dump()))
    steps = resolved.training.steps if config.training.budget else None
    timed = any(getattr(config.decisions, key) is not None for key in TIMED)
    return resolve(filled, steps=steps, latency={"target_keep": resolved.decisions.target_keep} if timed else None)


def _filled(asked: Any, resolved: Any) -> Any:
    """The settings asked for, with what they leave open as it was resolved."""
    if isinstance(asked, dict) and isinstance(resolved, dict):
        return {key: _filled(value, resolved.get(key)) for key, value in asked.items()}
    return resolved if asked in (None, AUTO) else asked


def for_target(state: Checkpoint, config: ResolvedConfig) -> Checkpoint:
    """A checkpoint from before the first decision, as that of a run under `config`.

    Nothing depends on the target until then (`ATPTrainer.train_open` ends there), so the config may have another
    target, number of rounds and `output_dir`. Raises `InputError` for a later checkpoint, or any other difference.
    """
    if state.step > config.training.opened or state.meta["frozen"] or not bool(state.tensors["mask"].all()):
        raise InputError(
            f"the checkpoint of step {state.step} holds decisions for a target: start another target from a checkpoint "
            f"of the open phase, which ends at step {config.training.opened}"
        )
    now = config.decisions
    decisions = state.meta["config"]["decisions"] | {"target_keep": now.target_keep, "rounds": now.rounds}
    config.refuse_change_of(state.meta["config"] | {"output_dir": config.output_dir, "decisions": decisions})
    return Checkpoint(state.step, state.tensors, state.meta | {"config": config.model_dump(mode="json")})


def inputs_of(folder: Path) -> dict[str, str] | None:
    """Fingerprints of the inputs that a run started with, None if neither inputs.json nor a checkpoint has them."""
    return read_json(folder / INPUTS) or _newest_values(folder).get("inputs")


def _newest_values(folder: Path) -> dict[str, Any]:
    found = (newest(folder / name) for name in CHECKPOINTS)
    return next((read_values(path) for path in found if path is not None), {})


def of_model_folder(folder: Path) -> str | None:
    """SHA-256 over what loading a saved model reads: names and content of its JSON and safetensors files."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".safetensors"))
    if not files:
        return None
    return _of_text(f"{path.name} {sha256(path)}" for path in files)


def _of_weights(model: nn.Module) -> str:
    weights = sorted(
        (_WRAPPING.sub("", name), parameter) for name, parameter in model.named_parameters() if ".lora_" not in name
    )
    if processes.sharded():  # one at a time is whole
        return _of_text(f"{name} {_of_tensor(whole(parameter))}" for name, parameter in weights)
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        digests = pool.map(lambda item: f"{item[0]} {_of_tensor(item[1])}", weights)
        return _of_text(digests)


def _of_tensor(tensor: Tensor) -> str:
    if isinstance(tensor, QuantizedWeight):
        return f"{tensor.dtype} {' '.join(map(_of_tensor, tensor.parts))}"
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(flat.numpy().data).hexdigest()}"


def of_words(kept: Tensor) -> str:
    """SHA-256 of the words that `vocabulary.keep` leaves, int64 [words]."""
    return _of_text([_of_tensor(kept)])


def of_samples(split: Dataset) -> str:
    digest = hashlib.sha256()
    # Stored samples are read faster in order than one by one.
    samples = split if isinstance(split, Iterable) else (split[index] for index in range(sized(split)))
    for sample in samples:
        for name, value in sorted(sample.items()):
            digest.update(f"{name} {_of_tensor(torch.as_tensor(value))}\n".encode())
    return digest.hexdigest()


def _of_text(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _config(config: Any) -> Iterable[str]:
    values = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_THE_MODEL}
    yield json.dumps(values, sort_keys=True, default=str)


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    yield json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], sort_keys=True, default=str)
    yield rules_of(tokenizer)
