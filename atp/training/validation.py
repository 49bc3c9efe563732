"""The loss on a validation split while training goes on: what it was when, the best adapter, and when to stop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from atp.config import ATPConfig
from atp.data import collate
from atp.data.encoding import byte_lengths
from atp.evaluation.inference import CausalLM, inference
from atp.ground.errors import InputError
from atp.processes import processes
from atp.training.data import sized, to_device
from atp.training.loss import causal_lm_loss


class Validation:
    """Scores of one model in training, on the same samples each time.

    `training.keep_best` and `training.patience` compare only scores of the model that will be exported, those from the
    cut on: before it, a model is larger or under masks that still move.
    """

    def __init__(
        self,
        config: ATPConfig,
        dataset: Dataset | None,
        autocast: torch.dtype | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """dataset: samples like those of training; needed if `evaluation.every` is set, or this raises `InputError`.

        tokenizer: knows how many bytes of text tokens stand for.
        """
        self.tokenizer = tokenizer
        self.bytes_per_token = 0.0  # of the tokens that are scored; 0 where it is not known
        self.every = config.evaluation.every
        self.batch_size, self.autocast = config.evaluation.batch_size, autocast
        self.keep_best, self.patience = config.training.keep_best, config.training.patience
        if self.every and dataset is None:
            raise InputError("evaluation.every is set and there is no validation data: pass `validation`")
        self.dataset = dataset if self.every else None
        self.count = 0 if self.dataset is None else min(config.evaluation.validation_windows or 0, sized(self.dataset))
        self.last: float | None = None
        self.becoming: dict[str, float] = {}  # between open phase and tune: the loss of what the model had become
        self.best: dict[str, Any] | None = None  # step and loss
        self.adapter: dict[str, Tensor] = {}  # trained tensors of the best score, where it is kept
        self.waited = 0  # scores since the best one

    def due(self, step: int, total: int) -> bool:
        """Whether the model is scored after this step."""
        return self.every is not None and (step % self.every == 0 or step == total)

    @property
    def exhausted(self) -> bool:
        """Whether so many scores in a row were no better that training stops."""
        return self.patience is not None and self.waited >= self.patience

    def measure(self, model: CausalLM, device: torch.device) -> float:
        """Mean cross-entropy per scored token, in nats, of the model as it is; the main process's figure for all."""
        self.last = processes.together(lambda: self._measure(model, device))
        return self.last

    def _measure(self, model: CausalLM, device: torch.device) -> float:
        assert self.dataset is not None
        total, tokens, size = 0.0, 0, 0
        with inference(model, self.autocast):
            for start in range(0, self.count, self.batch_size):
                rows = range(start, min(start + self.batch_size, self.count))
                batch = to_device(collate([self.dataset[row] for row in rows]), device)
                total += float(causal_lm_loss(model, batch, 1))
                tokens += len(batch["targets"])
                lengths = None if self.tokenizer is None else byte_lengths(self.tokenizer, batch["targets"].cpu())
                size += 0 if lengths is None else int(lengths.sum())
        self.bytes_per_token = size / tokens
        return total / tokens

    def figures(self, loss: float) -> dict[str, float]:
        """A loss per token as records hold it, and in bits per byte where bytes are known."""
        found = {"validation_loss": loss}
        if self.bytes_per_token:
            found["validation_bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return found

    def compare(self, step: int, loss: float, adapter: dict[str, Tensor]) -> None:
        """Notes whether a score of the model that will be exported is the best so far."""
        if math.isfinite(loss) and (self.best is None or loss < self.best["loss"]):
            self.best, self.waited = {"step": step, "loss": loss}, 0
            if self.keep_best:
                self.adapter = {name: value.detach().clone() for name, value in adapter.items()}
        else:
            self.waited += 1

    def summary(self, step: int) -> dict[str, Any]:
        """What the summary of a run says; step: the last one of training. Nothing without a validation split."""
        if not self.every:
            return {}
        kept = {"kept_step": self.best["step"] if self.keep_best and self.best else step}
        return {"validation": self.becoming | {"last": self.last, "best": self.best, "last_step": step} | kept}

    def state(self) -> dict[str, Any]:
        """All but the adapter, for JSON."""
        return {"last": self.last, "best": self.best, "waited": self.waited, "becoming": self.becoming}

    def load(self, state: dict[str, Any], adapter: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.last, self.best, self.waited = state["last"], state["best"], state["waited"]
        self.becoming = dict(state["becoming"])
        self.adapter = adapter
